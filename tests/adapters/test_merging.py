"""Merges against fp64 algebra: 200 random layers, every convention, and what cannot be merged."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from torch import Tensor

from app.domain.adapters import GroupedSpec, QABLoRASpec, QAHiRASpec, QALoRASpec
from app.domain.adapters.shapes import shape_for
from app.domain.methods import Scheme
from bitwright.errors import NumericalFailure, OffsetNotRepresentable
from workers.adapters import merging
from workers.adapters.attaching import Attach, report
from workers.adapters.grouped import GroupedAdapter
from workers.adapters.merging import exact_weight, fold, folded, offsets
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.normal_float import quantize
from workers.numerics.quantized import AffineWeight, LinearResult

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantized(scheme: Scheme, shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> AffineWeight:
    weight = torch.randn(shape, generator=generator(seed)) * 0.05
    w = grouped(weight, scheme.group_size)
    to = affine_grid(GroupRange.of(w), scheme, torch.float16)
    return affine_weight(round_to_grid(w, to)[0], to, scheme, torch.float16, dtype)


def trained(spec: GroupedSpec, shape: tuple[int, int], group: int, seed: int) -> GroupedAdapter:
    adapter = GroupedAdapter(shape_for(spec, shape[1], shape[0], group))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)) * 0.1)
    return adapter


def by_hand(weight: AffineWeight) -> Tensor:
    """sc*(q - z) or sc*q + beta, one group at a time."""
    rows = []
    for row in range(weight.shape[0]):
        parts = []
        for group, codes in enumerate(weight.codes[row].double().split(weight.group_size)):
            scale = float(weight.scale[row, group])
            if weight.offset is not None:
                parts.append(scale * codes + float(weight.offset[row, group]))
            else:
                zero = (
                    2 ** (weight.scheme.bits - 1) if weight.zero_point is None else int(weight.zero_point[row, group])
                )
                parts.append(scale * (codes - zero))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def random_case(seed: int) -> tuple[AffineWeight, GroupedAdapter, int]:
    choose = random.Random(seed)
    group = choose.choice([16, 32, 64, 128])
    shape = (choose.choice([8, 24, 40]), group * choose.choice([1, 2, 3, 6]))
    scheme = Scheme(bits=choose.randint(2, 8), group_size=group, symmetric=choose.random() < 0.5)
    specs: list[GroupedSpec] = [QALoRASpec(rank=4), QAHiRASpec(rank=2), QABLoRASpec(rank=4, alpha=5)]
    spec = choose.choice([*specs, QAHiRASpec(repeat_out=4)])
    weight = quantized(scheme, shape, seed, choose.choice(DTYPES))
    return weight, trained(spec, shape, group, seed), group


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_layers_merge_into_the_adapted_model(first: int) -> None:
    for seed in range(first, first + 25):
        weight, adapter, group = random_case(seed)
        merged = fold(weight, adapter.group_delta(group))
        proof, after = merged.proof, merged.weight
        # Codes and scales are the same bits, and there is an offset now.
        assert torch.equal(after.codes, weight.codes)
        assert torch.equal(after.scale, weight.scale)
        assert proof.codes_and_scales_kept
        assert after.offset is not None
        assert not after.scheme.symmetric
        # The adapter's forward pass and the merged one, in fp64.
        exact = by_hand(weight) + adapter.delta_weight().detach()
        x = torch.randn(4, weight.shape[1], dtype=torch.float64, generator=generator(seed + 1000))
        apart = x @ by_hand(weight).T + adapter.double()(x).detach()
        assert (x @ exact.T - apart).abs().max() <= 1e-12 * apart.abs().max()
        assert proof.error_exact <= 1e-15
        # What ships is within the stated bound, and the proof says the true error.
        found = (after.dequantize().double() - exact).abs().max()
        assert proof.error_shipped == pytest.approx(float(found), rel=1e-9, abs=1e-15)
        assert proof.error_shipped <= proof.bound
        assert proof.bound <= 2 * torch.finfo(weight.dtype).eps * exact.abs().max() + 1e-5


def test_the_bound_is_that_of_the_dtypes() -> None:
    """In fp32 it is below a thousandth of a step, so that a wrong factor or sign could not hide in it."""
    weight, group = quantized(Scheme(bits=4, group_size=32, symmetric=False), (8, 64), 1), 32
    adapter = trained(QALoRASpec(rank=4), (8, 64), group, 1)
    proof = fold(weight, adapter.group_delta(group)).proof
    assert proof.bound < 1e-3 * float(weight.scale.min())
    wrong = (fold(weight, -adapter.group_delta(group)).weight.dequantize() - weight.dequantize()).double()
    assert (wrong - adapter.delta_weight()).abs().max() > 100 * proof.bound


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_update_by_one_step_is_one_code_more(symmetric: bool) -> None:
    weight = quantized(Scheme(bits=3, group_size=16, symmetric=symmetric), (8, 64), 3)
    after = fold(weight, weight.scale.double()).weight
    shifted = AffineWeight(
        weight.codes + 1, weight.scale, weight.zero_point, weight.scheme, weight.dtype, weight.offset
    )
    assert (exact_weight(after) - exact_weight(shifted)).abs().max() <= 1e-7


def test_a_merge_and_its_inverse_restore_the_offset() -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=False), (8, 64), 4)
    delta = torch.randn(8, 4, dtype=torch.float64, generator=generator(4)) * 0.01
    back = fold(fold(weight, delta).weight, -delta).weight
    assert back.offset is not None
    assert (back.offset.double() - offsets(weight)).abs().max() <= torch.finfo(torch.float32).eps


def test_two_adapters_add() -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=True), (8, 64), 5)
    first, second = (torch.randn(8, 4, dtype=torch.float64, generator=generator(seed)) * 0.01 for seed in (1, 2))
    both = fold(fold(weight, first).weight, second).weight
    expected = by_hand(weight) + (first + second).repeat_interleave(16, 1)
    assert (both.dequantize().double() - expected).abs().max() <= 1e-7


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_zero_points_tell_their_error(symmetric: bool) -> None:
    """About half a step where they fit, as the float offset never does; more where they are clamped, and told too."""
    weight = quantized(Scheme(bits=4, group_size=32, symmetric=symmetric), (16, 128), 6)
    delta = weight.scale.double() * (torch.rand(16, 4, dtype=torch.float64, generator=generator(6)) - 0.5)
    merged = fold(weight, delta, round_offset=True)
    assert merged.weight.offset is None
    assert merged.weight.zero_point is not None
    assert merged.proof.rounded
    exact = by_hand(weight) + delta.repeat_interleave(32, 1)
    assert merged.proof.error_stored == pytest.approx(float((by_hand(merged.weight) - exact).abs().max()), rel=1e-9)
    assert 0.2 * weight.scale.abs().max() <= merged.proof.error_stored <= 0.5001 * weight.scale.abs().max()
    assert fold(weight, delta).proof.error_stored < 1e-6 * merged.proof.error_stored * 100
    far = fold(weight, delta + 40 * weight.scale.double(), round_offset=True).proof
    assert far.error_stored > 10 * float(weight.scale.abs().max())


def test_errors_by_the_offsets_dtype() -> None:
    """An offset in fp64 is exact to 1e-16; in fp16 it is a small part of a step; an integer zero point half a step."""
    weight = quantized(Scheme(bits=4, group_size=32, symmetric=False), (32, 128), 7)
    scale = weight.scale.abs().max()
    weight = AffineWeight(
        weight.codes, (weight.scale * (0.1 / scale)).half(), weight.zero_point, weight.scheme, torch.float32
    )
    delta = torch.randn(32, 4, dtype=torch.float64, generator=generator(7)) * 0.1
    errors = {dtype: fold(weight, delta, offset_dtype=dtype).proof.error_stored for dtype in (torch.float64, *DTYPES)}
    assert errors[torch.float64] <= 1e-15
    assert errors[torch.float32] <= 1e-7
    assert 1e-5 <= errors[torch.float16] <= 1e-3
    assert 1e-2 <= fold(weight, delta.clamp(-0.05, 0.05), round_offset=True).proof.error_stored <= 6e-2


def test_the_hashes_are_of_the_bytes() -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=True), (8, 64), 8)
    proof = fold(weight, torch.zeros(8, 4)).proof
    assert proof.codes_before == sha256(weight.codes.numpy().tobytes()).hexdigest()
    assert proof.scales_before == sha256(weight.scale.numpy().tobytes()).hexdigest()


def test_a_codebook_has_no_offset() -> None:
    base = quantize(torch.randn(8, 64), Scheme(bits=4, group_size=16, symmetric=True), torch.float32, torch.float32)
    with pytest.raises(OffsetNotRepresentable, match="codebook"):
        fold(base, torch.zeros(8, 4), name="model.layers.0.mlp.up_proj")


def test_an_offset_that_does_not_fit_its_dtype_is_refused() -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=True), (8, 64), 9)
    with pytest.raises(OffsetNotRepresentable, match="float16"):
        fold(weight, torch.full((8, 4), 1e6), offset_dtype=torch.float16)


# ---- Proofs that can fail --------------------------------------------------------------------------------------------

MERGING: list[GroupedSpec] = [QALoRASpec(rank=4), QAHiRASpec(rank=2), QABLoRASpec(rank=4)]


def one_code_more(weight: AffineWeight) -> AffineWeight:
    codes = weight.codes.clone()
    codes[3, 17] ^= 1
    return replace(weight, codes=codes)


def one_scale_more(weight: AffineWeight) -> AffineWeight:
    scale = weight.scale.clone()
    scale[3, 2] *= 1.5
    return replace(weight, scale=scale)


def nothing_more(weight: AffineWeight) -> AffineWeight:
    return weight


@pytest.mark.parametrize(("change", "kept"), [(one_code_more, False), (one_scale_more, False), (nothing_more, True)])
def test_a_merge_that_touches_codes_or_scales_is_told(
    change: Callable[[AffineWeight], AffineWeight], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=True), (8, 64), 8)
    monkeypatch.setattr(merging, "folded", lambda *given, **how: change(folded(*given, **how)))
    merged = fold(weight, torch.zeros(8, 4))
    assert merged.proof.codes_and_scales_kept is kept
    for before, after, said in (
        (weight.codes, merged.weight.codes, (merged.proof.codes_before, merged.proof.codes_after)),
        (weight.scale, merged.weight.scale, (merged.proof.scales_before, merged.proof.scales_after)),
    ):
        assert said == tuple(sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (before, after))


def test_the_report_tells_the_worst_of_all_merges() -> None:
    weight = quantized(Scheme(bits=4, group_size=32, symmetric=False), (8, 64), 1)
    spec = QALoRASpec(rank=4)
    adapters = Attach(spec)({"up": LinearResult(weight)}, seed=1)
    good = fold(weight, torch.full((8, 2), 0.01)).proof
    bad = replace(good, codes_after="other", error_exact=1.0, error_stored=2.0, error_shipped=3.0, rounded=True)
    for proofs in ([good, bad], [bad, good]):
        told = report(spec, adapters, {"up": LinearResult(weight)}, proofs, "quantized").merge
        assert told is not None
        assert (told.codes_and_scales_kept, told.rounded, told.linears) == (False, True, 2)
        assert (told.error_exact, told.error_stored, told.error_shipped) == (1.0, 2.0, 3.0)
    assert report(spec, adapters, {"up": LinearResult(weight)}, [good], "16bit").merge is None


# ---- Offsets at the edge ---------------------------------------------------------------------------------------------


def with_one(delta: float, shape: tuple[int, int] = (8, 4)) -> Tensor:
    """An update that is small but for one group."""
    found = torch.full(shape, 0.01, dtype=torch.float64)
    found[5, 1] = delta
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("beyond", "within", "dtype"), [(65_600.0, 65_000.0, torch.float16), (1e39, 3e38, torch.float32)]
)
def test_one_offset_beyond_its_dtype_among_good_ones_is_refused(
    beyond: float, within: float, dtype: torch.dtype, symmetric: bool
) -> None:
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=symmetric), (8, 64), 9)
    for sign in (1, -1):
        with pytest.raises(OffsetNotRepresentable, match=str(dtype)) as refused:
            folded(weight, with_one(sign * beyond), name="model.layers.0.mlp.up_proj", offset_dtype=dtype)
        assert refused.value.field == "model.layers.0.mlp.up_proj"
        held = folded(weight, with_one(sign * within), offset_dtype=dtype)
        assert held.offset is not None
        assert held.offset.dtype == dtype
        assert bool(held.offset.isfinite().all())


@pytest.mark.parametrize("round_offset", [False, True])
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_one_update_that_is_not_finite_is_the_trainings_failure(damage: float, round_offset: bool) -> None:
    """Not a group that ends at the edge of its zero points, nor an advice to leave a format out."""
    weight = quantized(Scheme(bits=4, group_size=16, symmetric=False), (8, 64), 9)
    with pytest.raises(NumericalFailure, match=r"mlp\.up_proj is not finite") as refused:
        folded(weight, with_one(damage), name="model.layers.0.mlp.up_proj", round_offset=round_offset)
    assert refused.value.field == "finetune.learning_rate"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_out_of_range_after_a_round_end_at_the_last_that_there_is(bits: int, symmetric: bool) -> None:
    """By hand, one group at a time; a zero point of 2^bits, or of -1, is never stored."""
    weight = quantized(Scheme(bits=bits, group_size=16, symmetric=symmetric), (8, 64), bits)
    steps = torch.tensor([-400.0, -0.4, 0.4, 400.0], dtype=torch.float64).expand(8, 4)
    merged = fold(weight, weight.scale.double() * steps, round_offset=True)
    zero, before = merged.weight.zero_point, weight.zero_point
    assert zero is not None
    assert zero.dtype == torch.uint8
    assert not merged.weight.scheme.symmetric
    for row in range(8):
        for group in range(4):
            old = 2 ** (bits - 1) if before is None else int(before[row, group])
            wanted = min(max(round(old - float(steps[row, group])), 0), 2**bits - 1)
            assert int(zero[row, group]) == wanted
    assert sorted({int(value) for value in zero[:, 0]} | {int(value) for value in zero[:, 3]}) == [0, 2**bits - 1]


@pytest.mark.parametrize("spec", MERGING, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("value", [0.5, -0.5, 0.0])
def test_updates_of_one_sign_and_of_nothing_fold_exactly(spec: GroupedSpec, value: float) -> None:
    weight = quantized(Scheme(bits=8, group_size=32, symmetric=False), (8, 64), 2, torch.bfloat16)
    adapter = GroupedAdapter(shape_for(spec, 64, 8, 32))
    for parameter in adapter.parameters():
        parameter.data.fill_(abs(value))
    delta = adapter.group_delta(32).detach() * (1 if value >= 0 else -1)
    merged = fold(weight, delta)
    exact = by_hand(weight) + delta.repeat_interleave(32, 1)
    assert (by_hand(merged.weight) - exact).abs().max() <= 1e-6 * max(1.0, float(delta.abs().max()))
    assert merged.proof.error_shipped <= merged.proof.bound
    assert bool(delta.any()) is (value != 0)
