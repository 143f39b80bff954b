"""Roundings that a server does beside the weights, in the quantized stream: inputs of linears, cached keys and values.

What the evaluation measures, and what a block gets from those before it, includes them where the scheme of a linear or
the request says so. Their constants come from the pass of calibration text through the original block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from workers.contracts.kv_cache import KVScales
from workers.engine.device.process_group import ProcessGroup
from workers.engine.model.block_calls import BlockCall
from workers.engine.quantize.cache_states import CacheWatch, RoundedCache, with_cache
from workers.numerics.floats.input_rounding import InputRounding, input_roundings, rounding_inputs
from workers.numerics.floats.joined import sets_of
from workers.numerics.quantized import FloatWeight, LinearResult


@dataclass(frozen=True)
class Served:
    """The roundings of one block: of inputs by linear, and of its cache."""

    inputs: Mapping[str, InputRounding] = field(default_factory=dict)
    cache: KVScales | None = None

    @classmethod
    def of(cls, results: Mapping[str, LinearResult], cache: KVScales | None, device: torch.device) -> "Served":
        """Those of finished linears, by their names inside the block."""
        amax = {
            name: result.weight.input_amax.to(device)
            for name, result in results.items()
            if isinstance(result.weight, FloatWeight) and result.weight.input_amax is not None
        }
        return cls(input_roundings({name: result.weight.scheme for name, result in results.items()}, amax), cache)

    @contextmanager
    def within(self, block: nn.Module) -> Iterator[None]:
        """The block with rounded inputs."""
        with rounding_inputs({name: block.get_submodule(name) for name in self.inputs}, self.inputs):
            yield

    def call(self, call: BlockCall, device: torch.device) -> BlockCall:
        """The call of the block with a rounded cache."""
        return call if self.cache is None else with_cache(call, RoundedCache(self.cache, device))


class InputMaxima:
    """Largest magnitude of each input column of some linears, fp32 (in,), by name.

    What several linears get one after another is looked at once.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._columns: dict[str, Tensor] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the context lasts, the linears' inputs count."""
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def columns(self, processes: ProcessGroup) -> dict[str, Tensor]:
        """The maxima over all processes."""
        for name, linear in self._linears.items():
            own = self._columns.get(name)
            if own is None:
                own = torch.zeros(linear.in_features, device=linear.weight.device)
            self._columns[name] = largest_of(processes, own)
        return self._columns

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            if self._last is None or self._last[0] is not arguments[0] or self._last[1] != x._version:
                self._last = (arguments[0], x._version, x.flatten(0, -2).abs().amax(0).float())
            seen, known = self._last[2], self._columns.get(name)
            self._columns[name] = seen if known is None else torch.maximum(known, seen)

        return see


@dataclass(frozen=True)
class Measured:
    """Watches over a pass of calibration text through an original block; `cache` None: not over its cache."""

    inputs: InputMaxima
    cache: CacheWatch | None

    @classmethod
    def of(
        cls, linears: Mapping[str, nn.Linear], schemes: Mapping[str, Scheme], caches: bool, *, calibrates: bool
    ) -> "Measured":
        """The linears of calibrated schemes, and the cache where the request asks for its scales."""
        wanted = {
            name: linear
            for name, linear in linears.items()
            if calibrates and (row := schemes[name].row) is not None and row.calibrated
        }
        return cls(InputMaxima(wanted), CacheWatch() if caches and calibrates else None)


def largest_of(processes: ProcessGroup, own: Tensor) -> Tensor:
    """The largest of every process's numbers."""
    if processes.alone:
        return own
    places = own.new_zeros(processes.size, *own.shape)
    places[processes.rank] = own
    processes.sum_(places)
    return places.amax(0)


def cache_scales(watch: CacheWatch, processes: ProcessGroup, device: torch.device) -> KVScales | None:
    """Scales of what was seen by any process; None where nothing went into a cache."""
    zero = torch.zeros((), device=device)
    key, value = (zero if amax is None else amax for amax in (watch.key, watch.value))
    key, value = (largest_of(processes, amax) for amax in (key, value))
    return KVScales.of_amax(key, value) if processes.total(int(watch.key is not None)) else None


def set_amax(
    columns: Mapping[str, Tensor],
    joined: Sequence[tuple[str, ...]],
    schemes: Mapping[str, Scheme],
    results: Mapping[str, LinearResult] | None = None,
) -> dict[str, Tensor]:
    """Largest magnitude of the inputs of each linear and of all that a runtime joins with it, fp32 (1,).

    results   of a method that moves scales: an input column is divided by what its weights were multiplied by
    """
    amax = {}
    for name, column in columns.items():
        moved = 1.0 if results is None else results[name].scaling.columns
        amax[name] = (column / moved).amax().float().reshape(1)
    sets = sets_of(joined, schemes, amax)
    found = {name: torch.cat([amax[other] for other in names]).amax().reshape(1) for name, names in sets.items()}
    return {name: torch.where(own > 0, own, _of_namesakes(name, found)) for name, own in found.items()}


def _of_namesakes(name: str, amax: Mapping[str, Tensor]) -> Tensor:
    """For an expert without a token: the largest of all experts; 1 where there was nothing but zeros."""
    leaf = name.rpartition(".")[2]
    largest = torch.cat([own for other, own in amax.items() if other.rpartition(".")[2] == leaf]).amax().reshape(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def with_input_amax(results: Mapping[str, LinearResult], amax: Mapping[str, Tensor]) -> dict[str, LinearResult]:
    """The results with the numbers of their inputs, where their schemes store some."""
    return {
        name: replace(result, weight=replace(result.weight, input_amax=amax[name]))
        if name in amax and isinstance(result.weight, FloatWeight)
        else result
        for name, result in results.items()
    }
