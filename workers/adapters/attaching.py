"""An adapter's life beside a job's linears: attached, trained elsewhere, then merged, handed to a format, and reported.

    modules = Attach(spec)(results_of_a_block, seed)    trained by the engine
    shipped(name, result, module, merge)                what formats write of the linear, and the evaluation measures
    finished(name, result, module, merge)               the same with the proof of a merge
    stored(module)                                      what the adapter file holds of it

What a linear stands for with its adapter, whatever the kind, is `adapted(result, module)`: the update as two factors
beside the base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from app.domain.adapters import AdapterSpec, BayesianLoRASpec, LoRASpec
from app.domain.adapters.shapes import shape_for
from bitwright.errors import CorruptCheckpoint, InternalError, InvalidRequest
from bitwright.report import AdapterReport, BitOperations, MergeReport
from workers.adapters.bayesian import GATED_BYTES, BayesianLoRA, bops_report
from workers.adapters.grouped import GroupedAdapter
from workers.adapters.merging import MergeProof, fold, folded
from workers.numerics.quantized import LinearResult

Adapter = GroupedAdapter | BayesianLoRA
Merge = Literal["quantized", "16bit"] | None


@dataclass(frozen=True)
class Attach:
    """Makes the adapters of a block's linears (`workers.contracts.blocks`).

    trained  parameters at which adapters start, by full name; a LoRA's come with its linear
    """

    spec: AdapterSpec
    trained: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def pass_bytes(self) -> int:
        """Of each trained number, while a batch goes through."""
        return GATED_BYTES if isinstance(self.spec, BayesianLoRASpec) else 0

    def __call__(self, linears: Mapping[str, LinearResult], seed: int) -> dict[str, nn.Module]:
        """By full linear name, on the device of their weights; the same for the same seed.

        A LoRA goes on from the low-rank factors of its linear, if it has some.

        Raises:
            InvalidRequest: another kind cannot.
            CorruptCheckpoint: trained parameters are not those of the kind.
            MisalignedAdapter: the kind does not fit a linear's shape or groups.
        """
        generator = torch.Generator().manual_seed(seed)
        return {name: self._one(name, result, generator) for name, result in linears.items()}

    def _one(self, name: str, result: LinearResult, generator: torch.Generator) -> nn.Module:
        spec, (out_features, in_features) = self.spec, result.weight.shape
        device = result.weight.codes.device
        if result.low_rank is not None:
            if isinstance(spec, LoRASpec):
                return GroupedAdapter.continued(result.low_rank, spec.dropout)
            raise InvalidRequest(
                f"{name} has low-rank factors, and a {spec.kind} cannot go on from them",
                field="adapter.kind",
                hint="take the kind lora, or a method that makes no factors",
            )
        if isinstance(spec, BayesianLoRASpec):
            return BayesianLoRA(spec, in_features, out_features, device=device, generator=generator)
        shape = shape_for(spec, in_features, out_features, result.weight.scheme.group_size)
        adapter = GroupedAdapter(shape, spec.dropout, device=device, generator=generator)
        if self.trained:
            _restore(name, adapter, self.trained.get(name, {}))
        return adapter


def _restore(name: str, adapter: GroupedAdapter, trained: Mapping[str, Tensor]) -> None:
    wanted = {key: (tensor.shape, tensor.dtype) for key, tensor in adapter.state_dict().items()}
    if {key: (tensor.shape, tensor.dtype) for key, tensor in trained.items()} != wanted:
        raise CorruptCheckpoint(f"the earlier job's adapter of {name} has other tensors", field="base_job", value=name)
    adapter.load_state_dict(dict(trained))


@dataclass(frozen=True)
class Finished:
    """What formats write of a linear; `proof` where its adapter was folded in."""

    result: LinearResult
    proof: MergeProof | None = None


def adapted(result: LinearResult, adapter: nn.Module) -> LinearResult:
    """The base with the whole update beside it, as two fp32 factors."""
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
    """What `shipped` gives, with the proof where the adapter was folded in.

    Raises:
        MisalignedAdapter, OffsetNotRepresentable: it cannot be folded.
    """
    if merge != "quantized":
        return Finished(shipped(name, result, adapter, merge))
    delta = _group_delta(name, result, adapter)
    made = fold(result.weight, delta, name=name, offset_dtype=offset_dtype, round_offset=round_offset)
    return Finished(LinearResult(made.weight), made.proof)


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

    The factors stay beside the base where a format adds them in (16bit) or stock peft has them (lora, bayesian-lora);
    other adapters that are not merged are in the adapter file alone.

    Raises:
        MisalignedAdapter, OffsetNotRepresentable: it cannot be folded.
    """
    if merge == "quantized":
        delta = _group_delta(name, result, adapter)
        return LinearResult(
            folded(result.weight, delta, name=name, offset_dtype=offset_dtype, round_offset=round_offset)
        )
    if merge == "16bit" or is_stock(known(adapter)):
        return adapted(result, adapter)
    return LinearResult(result.weight)


def _group_delta(name: str, result: LinearResult, adapter: nn.Module) -> Tensor:
    module = known(adapter)
    if isinstance(module, BayesianLoRA):
        raise InternalError("a bayesian-lora merges in floating point alone", field=name)
    return module.group_delta(result.weight.scheme.group_size)


def is_stock(adapter: Adapter) -> bool:
    """Whether its factors are a LoRA as stock peft has it."""
    if isinstance(adapter, BayesianLoRA):
        return True
    shape = adapter.shape
    return (shape.pool_in, shape.repeat_out, shape.form) == (1, 1, "pair")


@torch.no_grad()
def stored(adapter: nn.Module) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What the adapter file (`workers.formats.adapter_file`) says and holds of one adapter; no tensors without rank."""
    module = known(adapter)
    if isinstance(module, BayesianLoRA):
        left = module.compact()
        tensors = {"a_codes": left.a_codes, "a_step": left.a_step, "b_codes": left.b_codes, "b_step": left.b_step}
        facts: dict[str, object] = {"form": "integer", "a_bits": left.a_bits, "b_bits": left.b_bits}
        facts |= {"pool_in": 1, "repeat_out": 1, "scale": left.scale, "rank": left.rank}
        return facts, {name: t.cpu() for name, t in tensors.items()} if left.rank else {}
    shape = module.shape
    facts = {"form": shape.form, "pool_in": shape.pool_in, "repeat_out": shape.repeat_out}
    facts |= {"scale": shape.scale, "rank": shape.rank}
    return facts, {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


def report(
    spec: AdapterSpec,
    adapters: Mapping[str, nn.Module],
    results: Mapping[str, LinearResult],
    proofs: Iterable[MergeProof] = (),
    merge: Merge = None,
) -> AdapterReport:
    """What the job's report tells of its adapters, by full linear name, with the bases that they stand beside."""
    modules = {name: known(adapter) for name, adapter in adapters.items()}
    weights = sum(result.weight.codes.numel() for name, result in results.items() if name in modules)
    gated = {name: module for name, module in modules.items() if isinstance(module, BayesianLoRA)}
    ranks = [_rank(module) for module in modules.values()]
    bits = sum(_bits(module) for module in modules.values())
    return AdapterReport(
        kind=spec.kind,
        rank=spec.rank,
        inner_ranks=(min(ranks), max(ranks)),
        parameters=sum(sum(p.numel() for p in module.parameters()) for module in modules.values()),
        parameters_lora=sum(spec.rank * sum(results[name].weight.shape) for name in modules if name in results),
        flops_per_token=sum(_flops(module) for module in modules.values()),
        bits_per_weight=bits / max(1, weights),
        bit_operations=_bit_operations(gated, results) if gated else None,
        merge=_merge_report(list(proofs)) if merge == "quantized" else None,
    )


def known(adapter: nn.Module) -> Adapter:
    """The module as one of this package's.

    Raises:
        InternalError: it is another.
    """
    if isinstance(adapter, GroupedAdapter | BayesianLoRA):
        return adapter
    raise InternalError(f"{type(adapter).__name__} is no adapter of this package")


def _rank(module: Adapter) -> int:
    return module.compact().rank if isinstance(module, BayesianLoRA) else module.shape.rank


def _bits(module: Adapter) -> int:
    """As stored: fp32 parameters, or integers with their steps."""
    return module.compact().stored_bits() if isinstance(module, BayesianLoRA) else 32 * module.shape.parameters


def _flops(module: Adapter) -> int:
    if isinstance(module, BayesianLoRA):
        return 2 * _rank(module) * (module.in_features + module.out_features)
    return module.shape.flops_per_token


def _bit_operations(gated: Mapping[str, BayesianLoRA], results: Mapping[str, LinearResult]) -> BitOperations:
    found = bops_report(gated, {name: results[name].weight.scheme.bits for name in gated})
    return BitOperations(
        adapter=found.adapter,
        adapter_16bit=found.adapter_16bit,
        adapter_saving=found.adapter_saving,
        model=found.model,
        model_16bit=found.model_16bit,
        model_saving=found.model_saving,
        ranks=dict(found.ranks),
        bits=dict(found.bits),
    )


def _merge_report(proofs: list[MergeProof]) -> MergeReport:
    return MergeReport(
        codes_and_scales_kept=all(proof.codes_and_scales_kept for proof in proofs),
        linears=len(proofs),
        rounded=any(proof.rounded for proof in proofs),
        error_exact=max(proof.error_exact for proof in proofs),
        error_stored=max(proof.error_stored for proof in proofs),
        error_shipped=max(proof.error_shipped for proof in proofs),
    )
