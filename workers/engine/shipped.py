"""Shipped form of a job's result: a format's folds, sums and rounding are applied before anything is measured.

Checkpoints of a job need not stand for the same numbers, so there may be several `Shipment`s of it:

    whole     W_hat, with what was folded into it; the product of low-rank factors added, and the sum rounded once
    beside    W_hat, and the adapter beside it: factors as stock peft adds them, others as their own loader does
    base      W_hat alone

GGUF and MLX have offsets of 16 bits in place of zero points, so that their W_hat may be others. Each is measured once:
the evaluation text goes through all blocks again with weights that are made of the finished blocks as the export makes
them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor, nn

from app.domain.adapters import AdapterSpec
from app.domain.format_rules import halves_offsets, rounds_offsets, stored_formats
from app.domain.formats import ExportFormat
from app.domain.methods import Form
from app.domain.request.combination_rules import result_forms
from app.domain.request.job_request import JobRequest
from bitwright.formats import ADAPTER_FOLDER
from workers.adapters.attaching import Finished, Merge, finished, known, shipped
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_reader import BlockReader
from workers.formats.registry import held
from workers.numerics.quantized import AffineWeight, LinearResult, LowRank


class Numbers(Enum):
    """Numbers that a linear of a shipment computes with."""

    WHOLE = "whole"
    BESIDE = "beside"
    BASE = "base"


Key = tuple[Numbers, ExportFormat | None]
"""Numbers, and the format as whose files they are rounded."""


@dataclass(frozen=True)
class Shipment:
    """Checkpoints that give the same numbers when they are loaded one way.

    checkpoints   by folder
    adapter       folder of the adapter that is loaded beside them; None: nothing is
    rounding      the format as whose files weights are rounded; None: as they are
    """

    checkpoints: tuple[str, ...]
    numbers: Numbers
    adapter: str | None = None
    rounding: ExportFormat | None = None

    @property
    def is_whole(self) -> bool:
        """True if it is the result, and not a part of it."""
        return self.numbers is not Numbers.BASE

    @property
    def key(self) -> Key:
        """Equal for shipments of which one measurement is enough."""
        return self.numbers, self.rounding


@dataclass(frozen=True)
class TrainedAdapters:
    """Adapters by full linear name, on the host, and what the request wants of them.

    offset_dtype   of offsets that an adapter is folded into: one for all formats of a job, so that all hold the same
    """

    spec: AdapterSpec
    modules: Mapping[str, nn.Module]
    merge: Merge
    round_offset: bool
    offset_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, request: JobRequest, spec: AdapterSpec, modules: Mapping[str, nn.Module]) -> "TrainedAdapters":
        """Adapters that a job of this request trained."""
        dtype = torch.float16 if halves_offsets(request.formats) else torch.float32
        return cls(spec, modules, request.merge, request.round_offset, dtype)

    def result(self, name: str, base: LinearResult) -> LinearResult:
        """The result that formats write of a linear, on the host; one without an adapter is its base."""
        if name not in self.modules:
            return base
        module, dtype = self.modules[name], self.offset_dtype
        return shipped(name, base, module, self.merge, round_offset=self.round_offset, offset_dtype=dtype)

    def results(self, bases: Mapping[str, LinearResult]) -> dict[str, LinearResult]:
        """The same of a block's linears, by full name."""
        return {name: self.result(name, base) for name, base in bases.items()}

    def finished(self, name: str, base: LinearResult) -> Finished:
        """The same, with the proof of its merge."""
        if name not in self.modules:
            return Finished(base)
        module, dtype = self.modules[name], self.offset_dtype
        return finished(name, base, module, self.merge, round_offset=self.round_offset, offset_dtype=dtype)


def shipments(
    formats: Sequence[ExportFormat], *, factors: bool, trained: bool, merge: Merge, rounding: Collection[ExportFormat]
) -> list[Shipment]:
    """Every way to load what a job stores: the whole result as it was asked for first, what is only a part last.

    formats           that were asked for; `native` is stored besides
    factors           whether the results have low-rank factors
    trained           whether an adapter was
    rounding          formats that round some of their offsets
    """
    stored = stored_formats(formats)
    bases = tuple(name for name in stored if not name.info.is_adapter and not name.info.holds_factors)
    native = tuple(name for name in stored if name.info.holds_factors)
    adapter = next((name.value for name in stored if name.info.is_adapter), None)
    ways: list[tuple[Sequence[ExportFormat], Numbers, str | None]] = []
    if adapter is not None:
        ways += [(bases or native, Numbers.BESIDE, adapter), (native, Numbers.WHOLE, None)]
        ways += [(bases, Numbers.BASE, None)] if bases else []
    elif trained and merge is None and not factors:
        ways += [(stored, Numbers.BESIDE, ADAPTER_FOLDER), (stored, Numbers.BASE, None)]
    else:
        ways += [(stored, Numbers.WHOLE, None)]
        ways += [(native, Numbers.BESIDE, ADAPTER_FOLDER)] if trained and factors else []
    all_shipments = [
        Shipment(tuple(name.value for name in alike), numbers, beside, rounded_as)
        for names, numbers, beside in ways
        for alike, rounded_as in _split(names, rounding)
        if alike
    ]
    order = [name.value for name in stored]

    def turn(shipment: Shipment) -> tuple[bool, int]:
        folders = [*shipment.checkpoints, *([shipment.adapter] if shipment.adapter in order else [])]
        return not shipment.is_whole, min(map(order.index, folders))

    return sorted(all_shipments, key=turn)


def _split(
    names: Sequence[ExportFormat], rounding: Collection[ExportFormat]
) -> list[tuple[list[ExportFormat], ExportFormat | None]]:
    exact = [name for name in names if name not in rounding]
    return [(exact, None), *(([name], name) for name in names if name in rounding)]


def shipments_of(job: Job) -> list[Shipment]:
    """Every way to load the checkpoints of a job, the one that was asked for first."""
    request = job.request
    return shipments(
        request.formats,
        factors=Form.LOW_RANK in result_forms(job.spec, request.adapter, request.merge),
        trained=job.trains,
        merge=request.merge,
        rounding=_rounding_formats(job),
    )


def evaluated_key(job: Job) -> Key | None:
    """Key of the numbers that the evaluation's activations have gone through once all blocks and scales are done.

    None where that is no shipment: weights alone, although a method or base job began with factors beside them.
    """
    if not job.trains:
        return Numbers.WHOLE, None
    began_with_factors = job.base_job is not None or Form.LOW_RANK in job.spec.forms()
    return None if began_with_factors else (Numbers.BASE, None)


def _rounding_formats(job: Job) -> tuple[ExportFormat, ...]:
    """The job's formats in which zero points become offsets of 16 bits, if it has zero points."""
    request, schemes = job.request, job.schemes
    rounding = rounds_offsets(request.formats)
    if request.merge == "quantized":
        if request.round_offset:
            return rounding
        # Offsets of all formats are fp16 then, where one has them so; embeddings and head have no adapter.
        in_model_dtype = tuple(name for name in rounding if not halves_offsets([name]))
        if in_model_dtype:
            return in_model_dtype
        schemes = {name: scheme for name, scheme in schemes.items() if name not in job.block_schemes}
    return rounding if any(not scheme.symmetric for scheme in schemes.values()) else ()


@dataclass(frozen=True)
class Replay:
    """Takes the activations of the evaluation text through finished blocks with the numbers of a shipment.

    trained   adapters, where some were
    """

    model: StreamedModel
    finished: FinishedBlocks
    trained: TrainedAdapters | None = None
    _apart: dict[str, LowRank | nn.Module] = field(default_factory=dict)
    """Updates beside linears of the blocks that were read, until they are used."""

    def run(self, activations: Activations, shipment: Shipment) -> None:
        """X_q of the activations, rewound to the embeddings, through all blocks."""
        activations.rewind(self.model, self._embeddings(shipment))

        def shipped_base(name: str, base: LinearResult) -> LinearResult:
            return self._shipped_base(name, base, shipment)

        with closing(BlockReader(self.model, self.finished).quantized_blocks(shipped_base)) as blocks:
            for index, block in enumerate(blocks):
                with self.model.filled(block.original), self._beside(index):
                    activations.advance_quantized(index, self.model.blocks[index])

    @contextmanager
    def whole(self, shipment: Shipment) -> Iterator[None]:
        """The model with all weights of a shipment at once, and linears that add what stands beside them."""
        layout, head, weights = self.model.layout, self.head(shipment), dict[str, Tensor]()
        given = self._embeddings(shipment) | ({} if head is None else {f"{layout.head}.weight": head})

        def shipped_base(name: str, base: LinearResult) -> LinearResult:
            return self._shipped_base(name, base, shipment)

        with ExitStack() as stack:
            with closing(BlockReader(self.model, self.finished).quantized_blocks(shipped_base)) as blocks:
                for index, block in enumerate(blocks):
                    weights |= block.original
                    stack.enter_context(self._beside(index))
            for name in dict.fromkeys((*layout.outer, *self.model.after_blocks)):
                weights |= self.model.read(name, given)
            stack.enter_context(self.model.filled(weights))
            yield

    def _embeddings(self, shipment: Shipment) -> dict[str, Tensor]:
        """The dequantized matrix of embeddings, by parameter, where that is quantized."""
        return {
            f"{name}.weight": self._shipped_base(name, base, shipment).to(self.model.device).dequantize()
            for name, base in self.finished.load_embeddings().items()
        }

    def head(self, shipment: Shipment) -> Tensor | None:
        """The dequantized weight of the head, where that is quantized; of a tied one that of the embeddings."""
        if len(self.finished.blocks) > len(self.model.blocks):
            name = self.model.layout.head
            base = self.finished.load(len(self.model.blocks))[name]
        elif self.model.tied and self.finished.embeddings is not None:
            ((name, base),) = self.finished.load_embeddings().items()
        else:
            return None
        return self._shipped_base(name, base, shipment).to(self.model.device).dequantize()

    def _shipped_base(self, name: str, base: LinearResult, shipment: Shipment) -> LinearResult:
        """The result that a linear's weight is dequantized from; called by the thread that reads ahead."""
        result = base if self.trained is None else self.trained.result(name, base)
        if shipment.numbers is not Numbers.WHOLE:
            if shipment.numbers is Numbers.BESIDE:
                self._set_apart(name, result)
            # Not that of the result: what was folded in stands beside it here.
            result = LinearResult(base.weight)
        if shipment.rounding is not None and isinstance(result.weight, AffineWeight):
            return replace(result, weight=held(shipment.rounding, name, result.weight))
        return result

    def _set_apart(self, name: str, result: LinearResult) -> None:
        module = None if self.trained is None else self.trained.modules.get(name)
        if module is None or known(module).is_stock:
            low_rank = result.low_rank
            if low_rank is not None:
                self._apart[name] = low_rank
        else:
            self._apart[name] = module

    @contextmanager
    def _beside(self, index: int) -> Iterator[None]:
        """A block whose linears add what was set apart."""
        device, prefix = self.model.device, self.model.layout.block(index) + "."
        with ExitStack() as stack:
            for name in [name for name in self._apart if name.startswith(prefix)]:
                apart = self._apart.pop(name)
                update = Factors(apart.to(device)) if isinstance(apart, LowRank) else deepcopy(apart).to(device).eval()
                linear = self.model.model.get_submodule(name)
                stack.callback(linear.register_forward_hook(_adding(update)).remove)
            yield


class Factors(nn.Module):
    """Low-rank factors as stock peft applies them: in fp32 at least, whatever the base computes in."""

    def __init__(self, low_rank: LowRank) -> None:
        super().__init__()
        dtype = torch.promote_types(low_rank.a.dtype, torch.float32)
        self.a, self.b = (nn.Parameter(factor.to(dtype), requires_grad=False) for factor in (low_rank.a, low_rank.b))
        self.scale = low_rank.alpha / low_rank.rank

    def forward(self, x: Tensor) -> Tensor:
        """The update, (.., out) in the factors' dtype, of `x` (.., in)."""
        inner = nn.functional.linear(x.to(self.a.dtype), self.a)
        update: Tensor = nn.functional.linear(inner, self.b) * self.scale
        return update


def _adding(update: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        adapted: Tensor = output + update(inputs[0])
        return adapted.to(output.dtype)

    return add
