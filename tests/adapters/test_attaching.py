"""An adapter's life: attached to every kind of base, merged, handed to the formats, reported."""

from pathlib import Path

import pytest
import torch
from torch import nn

from app.domain.adapters import (
    ADAPTERS,
    AdapterSpec,
    BayesianLoRASpec,
    LoRASpec,
    QAHiRASpec,
    QALoRASpec,
    QBaRASpec,
)
from app.domain.formats import ExportFormat, Offsets
from app.domain.methods import Scheme
from bitwright.errors import InvalidRequest, MisalignedAdapter, OffsetNotRepresentable
from tests.adapters.examples import SPECS
from tests.formats.examples import Made, codebook_made, random_result
from workers.adapters.attaching import Attach, adapted, finished, known, report
from workers.adapters.bayesian import BayesianLoRA
from workers.adapters.merging import MergeProof, exact_weight
from workers.formats import checkpoint, native
from workers.formats.gguf.blocks import pack
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import AffineWeight, LinearResult

SHAPES = {"up": (48, 64), "down": (64, 96)}
SYMMETRIC = Scheme(bits=4, group_size=32, symmetric=True)
ASYMMETRIC = Scheme(bits=4, group_size=32, symmetric=False)
MERGING = [spec for spec in SPECS if ADAPTERS[spec.kind].merges_quantized]


def bases(made: Made | Scheme, dtype: torch.dtype = torch.float32) -> dict[str, LinearResult]:
    return {name: random_result(shape, made, dtype, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}


def trained(spec: AdapterSpec, results: dict[str, LinearResult]) -> dict[str, nn.Module]:
    adapters = Attach(spec)(results, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters.values():
            for name, parameter in adapter.named_parameters():
                if name in ("b", "m"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return {name: adapter.eval() for name, adapter in adapters.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("made", [SYMMETRIC, ASYMMETRIC, codebook_made(4, 32)], ids=["symmetric", "asymmetric", "nf4"])
def test_every_adapter_stands_beside_every_base(spec: AdapterSpec, made: Made | Scheme) -> None:
    results = bases(made)
    adapters = trained(spec, results)
    assert adapters.keys() == results.keys()
    for name, result in results.items():
        delta = known(adapters[name]).delta_weight().detach()
        x = torch.randn(3, SHAPES[name][1], dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        exact = x @ (result.dequantize().double() + delta).T
        merged = finished(name, result, adapters[name], "16bit").result
        assert (x @ merged.dequantize().double().T - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert torch.equal(adapted(result, adapters[name]).dequantize(), merged.dequantize())
        apart = finished(name, result, adapters[name], None).result
        assert torch.equal(apart.weight.dequantize(), result.weight.dequantize())
        assert (apart.low_rank is not None) == ADAPTERS[spec.kind].stock_peft


def test_the_same_seed_makes_the_same_adapters() -> None:
    results = bases(SYMMETRIC)
    for spec in SPECS:
        first, second, other = (Attach(spec)(results, seed) for seed in (1, 1, 2))
        for name in SHAPES:
            here, there = first[name].state_dict(), second[name].state_dict()
            assert all(torch.equal(here[key], there[key]) for key in here)
            if "a" in here:
                assert not torch.equal(here["a"], other[name].state_dict()["a"])


def test_a_lora_goes_on_from_a_methods_factors() -> None:
    results = bases(codebook_made(3, 32, rank=5))
    adapters = Attach(LoRASpec(rank=5))(results, seed=1)
    for name, result in results.items():
        assert torch.equal(adapted(result, adapters[name]).dequantize(), result.dequantize())
    with pytest.raises(InvalidRequest, match="cannot go on"):
        Attach(QBaRASpec())(results, seed=1)


@pytest.mark.parametrize("spec", MERGING, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_linear_survives_native_and_gguf(spec: AdapterSpec, scheme: Scheme, dtype: torch.dtype) -> None:
    results = bases(scheme, dtype)
    adapters = trained(spec, results)
    for name, result in results.items():
        done = finished(name, result, adapters[name], "quantized")
        assert done.proof is not None
        assert done.proof.codes_and_scales_kept
        assert done.proof.error_shipped <= done.proof.bound
        back = native.decompress(name, native.compress(name, done.result), StoredLinear.of(done.result))
        assert torch.equal(back.dequantize(), done.result.dequantize())
        if dtype is torch.float16:
            packed = pack(name, done.result.affine)
            assert packed.kind == 3  # Q4_1
            assert packed.offset_error < 0.05


def test_integer_zero_points_survive_packing_with_their_error_told() -> None:
    results = bases(ASYMMETRIC)
    adapters = trained(QAHiRASpec(rank=2), results)
    done = finished("up", results["up"], adapters["up"], "quantized", round_offset=True)
    assert done.proof is not None
    assert done.proof.rounded
    assert done.result.affine.zero_point is not None
    exact = exact_weight(results["up"].affine) + known(adapters["up"]).delta_weight().detach()
    assert float((exact_weight(done.result.affine) - exact).abs().max()) == pytest.approx(done.proof.error_stored)


def test_what_cannot_be_folded_is_refused() -> None:
    affine, codebook = bases(SYMMETRIC), bases(codebook_made(4, 32))
    with pytest.raises(OffsetNotRepresentable):
        finished("up", codebook["up"], trained(QAHiRASpec(), codebook)["up"], "quantized")
    with pytest.raises(MisalignedAdapter):
        finished("up", affine["up"], trained(LoRASpec(), affine)["up"], "quantized")


def test_the_report_counts_what_is_there() -> None:
    results = bases(SYMMETRIC)
    weights = 48 * 64 + 64 * 96
    plain = report(LoRASpec(rank=4), trained(LoRASpec(rank=4), results), results)
    assert plain.parameters == 4 * (48 + 64) + 4 * (64 + 96)
    assert plain.flops_per_token == 2 * plain.parameters
    assert plain.bits_per_weight == pytest.approx(32 * plain.parameters / weights)
    assert (plain.inner_ranks, plain.merge, plain.bit_operations) == ((4, 4), None, None)
    doubled = report(QBaRASpec(rank=4), trained(QBaRASpec(rank=4), results), results)
    assert (doubled.parameters, doubled.inner_ranks) == (plain.parameters, (8, 8))


def test_the_report_of_a_merge_and_of_gates() -> None:
    results = bases(SYMMETRIC)
    adapters = trained(QALoRASpec(rank=4), results)
    done = {name: finished(name, result, adapters[name], "quantized") for name, result in results.items()}
    proofs: list[MergeProof] = [each.proof for each in done.values() if each.proof is not None]
    told = report(QALoRASpec(rank=4), adapters, results, proofs, "quantized").merge
    assert told is not None
    assert told.codes_and_scales_kept
    assert told.linears == 2
    assert told.error_exact <= 1e-15
    assert told.error_shipped == max(proof.error_shipped for proof in proofs)
    gated = trained(BayesianLoRASpec(rank=4), results)
    first = gated["up"]
    assert isinstance(first, BayesianLoRA)
    with torch.no_grad():
        first.gate_rank[1:] = -6
        first.gate_a[0] = -6
    counted = report(BayesianLoRASpec(rank=4), gated, results)
    assert counted.inner_ranks == (1, 4)
    assert counted.bit_operations is not None
    assert counted.bit_operations.bits["up"] == (2, 16)
    assert counted.bits_per_weight == pytest.approx((64 * 2 + 48 * 16 + 64 + 4 * 160 * 16 + 64) / (48 * 64 + 64 * 96))


def test_a_gated_adapters_penalty_is_shared_over_the_job() -> None:
    adapters = Attach(BayesianLoRASpec(rank=4, penalty=0.5))(bases(SYMMETRIC), seed=1)
    gated = [adapter for adapter in adapters.values() if isinstance(adapter, BayesianLoRA)]
    assert len(gated) == len(SHAPES)
    assert float(BayesianLoRA.penalty(gated).detach()) == pytest.approx(0.5, rel=0.005)


def test_formats_that_hold_a_fold_are_those_that_say_so() -> None:
    assert ExportFormat.COMPRESSED_TENSORS.info.offsets is Offsets.NONE
    merged = finished("up", bases(ASYMMETRIC)["up"], trained(QALoRASpec(), bases(ASYMMETRIC))["up"], "quantized").result
    assert isinstance(merged.weight, AffineWeight)
    assert merged.weight.offset is not None
    assert Path(checkpoint.LOADER).is_file()
