"""Adapters beside a job's linears: attached, then (after training) merged, handed to a format, and reported.

    modules = Attach(spec)(results_of_a_block, seed)    trained by the engine
    shipped(name, result, module, merge)                the linear as formats write it and the evaluation measures it
    finished(name, result, module, merge)               the same with the proof of a merge
    stored(module)                                      its entry in the adapter file

A linear with its adapter of any kind is `adapted(result, module)`: the update as two factors beside the base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from app.domain.adapters import AdapterSpec
from bitwright.errors import InternalError
from bitwright.report import AdapterReport, MergeReport
from workers.adapters.adapter import Adapter
from workers.adapters.bayesian import BayesianLoRA
from workers.adapters.grouped import GroupedAdapter
from workers.adapters.merging import MergeProof, fold, folded
from workers.numerics.quantized import LinearResult

CLASSES: MappingProxyType[str, type[Adapter]] = MappingProxyType(
    {
        "lora": GroupedAdapter,
        "qa-lora": GroupedAdapter,
        "q-bara": GroupedAdapter,
        "qa-hira": GroupedAdapter,
        "qa-blora": GroupedAdapter,
        "bayesian-lora": BayesianLoRA,
    }
)
"""Adapter classes by the kind that a request names. A new class is one more line."""
Merge = Literal["quantized", "16bit"] | None


@dataclass(frozen=True)
class Attach:
    """Makes the adapters of a block's linears (`workers.contracts.blocks`).

    trained  parameters at which adapters start, by full name; those of a LoRA come with its linear
    """

    spec: AdapterSpec
    trained: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def pass_bytes(self) -> int:
        """Bytes per trained number while a batch goes through."""
        return adapter_class(self.spec).pass_bytes

    def __call__(self, linears: Mapping[str, LinearResult], seed: int) -> dict[str, Adapter]:
        """New adapters by full linear name, on the device of the linears' weights; the same for the same seed.

        A LoRA goes on from the low-rank factors of its linear, if it has some.

        Raises:
            InvalidRequest: a kind that cannot go on from factors.
            CorruptCheckpoint: trained parameters are not those of the kind.
            MisalignedAdapter: the kind does not fit a linear's shape or groups.
        """
        generator = torch.Generator().manual_seed(seed)
        return {name: self._one(name, result, generator) for name, result in linears.items()}

    def _one(self, name: str, result: LinearResult, generator: torch.Generator) -> Adapter:
        kind = adapter_class(self.spec)
        if result.low_rank is not None:
            return kind.continued(self.spec, result.low_rank, name)
        adapter = kind.beside(self.spec, result, generator)
        if self.trained:
            adapter.restore(self.trained.get(name, {}), name)
        return adapter


def adapter_class(spec: AdapterSpec) -> type[Adapter]:
    """The class of the adapters that a spec describes."""
    return CLASSES[spec.kind]


@dataclass(frozen=True)
class Finished:
    """The form of a linear that formats write; `proof` if its adapter was folded in."""

    result: LinearResult
    proof: MergeProof | None = None


def adapted(result: LinearResult, adapter: nn.Module) -> LinearResult:
    """The base with the complete update beside it, as two fp32 factors."""
    return LinearResult(result.weight, known(adapter).low_rank())


@torch.no_grad()
def finished(
    name: str,
    result: LinearResult,
    adapter: nn.Module,
    merge: Merge,
    *,
    round_offset: bool = False,
    offset_dtype: torch.dtype = torch.float32,
) -> Finished:
    """The result of `shipped`, with the proof if the adapter was folded in.

    Raises:
        MisalignedAdapter, OffsetNotRepresentable: it cannot be folded.
    """
    if merge != "quantized":
        return Finished(shipped(name, result, adapter, merge))
    delta = known(adapter).group_delta(result.weight.scheme.group_size)
    merged = fold(result.weight, delta, name=name, offset_dtype=offset_dtype, round_offset=round_offset)
    return Finished(LinearResult(merged.weight), merged.proof)


@torch.no_grad()
def shipped(
    name: str,
    result: LinearResult,
    adapter: nn.Module,
    merge: Merge,
    *,
    round_offset: bool = False,
    offset_dtype: torch.dtype = torch.float32,
) -> LinearResult:
    """A linear at the end of its job: folded, or the base with factors beside it, or the base alone.

    The factors stay beside the base if a format adds them in (16bit) or stock peft loads them (lora, bayesian-lora);
    other adapters that are not merged are in the adapter file alone.

    Raises:
        MisalignedAdapter, OffsetNotRepresentable: it cannot be folded.
    """
    if merge == "quantized":
        delta = known(adapter).group_delta(result.weight.scheme.group_size)
        return LinearResult(
            folded(result.weight, delta, name=name, offset_dtype=offset_dtype, round_offset=round_offset)
        )
    if merge == "16bit" or known(adapter).is_stock:
        return adapted(result, adapter)
    return LinearResult(result.weight)


@torch.no_grad()
def stored(adapter: nn.Module) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Facts and tensors of one adapter for the adapter file (`workers.formats.adapter_file`); no tensors at rank 0."""
    return known(adapter).stored()


def report(
    spec: AdapterSpec,
    adapters: Mapping[str, nn.Module],
    results: Mapping[str, LinearResult],
    proofs: Iterable[MergeProof] = (),
    merge: Merge = None,
) -> AdapterReport:
    """The report's section on a job's adapters, by full linear name, with their bases."""
    modules = {name: known(adapter) for name, adapter in adapters.items()}
    weights = sum(result.weight.codes.numel() for name, result in results.items() if name in modules)
    ranks = [module.inner_rank for module in modules.values()]
    base_bits = {name: results[name].weight.scheme.bits for name in modules if name in results}
    return AdapterReport(
        kind=spec.kind,
        rank=spec.rank,
        inner_ranks=(min(ranks), max(ranks)),
        parameters=sum(sum(p.numel() for p in module.parameters()) for module in modules.values()),
        parameters_lora=sum(spec.rank * sum(results[name].weight.shape) for name in modules if name in results),
        flops_per_token=sum(module.flops_per_token for module in modules.values()),
        bits_per_weight=sum(module.stored_bits for module in modules.values()) / weights,
        bit_operations=adapter_class(spec).bit_operations(modules, base_bits),
        merge=_merge_report(list(proofs)) if merge == "quantized" else None,
    )


def known(adapter: nn.Module) -> Adapter:
    """The module as one of this package's.

    Raises:
        InternalError: it is no adapter.
    """
    if isinstance(adapter, Adapter):
        return adapter
    raise InternalError(f"{type(adapter).__name__} is no adapter of this package")


def _merge_report(proofs: list[MergeProof]) -> MergeReport:
    return MergeReport(
        codes_and_scales_kept=all(proof.codes_and_scales_kept for proof in proofs),
        linears=len(proofs),
        rounded=any(proof.rounded for proof in proofs),
        error_exact=max(proof.error_exact for proof in proofs),
        error_stored=max(proof.error_stored for proof in proofs),
        error_shipped=max(proof.error_shipped for proof in proofs),
    )
