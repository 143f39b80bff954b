"""AWQ: scales move without changing what is computed, and what is rounded with them comes closer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from app.domain.methods import AWQSpec, RTNSpec, Scheme
from tests.methods.toy_block import GATED_FOLDS, gated_task
from workers.contracts.blocks import BlockTask, Fold
from workers.contracts.results import BlockResult
from workers.methods import awq
from workers.methods.awq import AWQ, clip_ranges, observe, search_scale, settle
from workers.methods.rtn import RTN
from workers.numerics.affine import GroupRange, affine_grid, grouped, round_to_grid

W3 = Scheme(bits=3, group_size=16, symmetric=False)
GATED: dict[str, Scheme] = {"gate": W3, "up": W3, "down": Scheme(bits=3, group_size=-1, symmetric=True)}


def output(task: BlockTask, result: BlockResult) -> Tensor:
    """Of the block with everything that the method changed in place."""
    weights = {f"{name}.weight": linear.weight.dequantize() for name, linear in result.linears.items()}
    with torch.no_grad():
        found: Tensor = functional_call(task.block, weights | result.parameters, task.inputs)
    return found


def output_error(task: BlockTask, result: BlockResult) -> float:
    return float((output(task, result) - task.targets).square().mean())


@pytest.mark.parametrize("spec", [AWQSpec(), AWQSpec(clip_search=False), AWQSpec(search_samples=3)], ids=str)
def test_a_block_with_outliers_comes_closer_than_with_rounding(spec: AWQSpec) -> None:
    task = gated_task(GATED)
    before = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    result = AWQ().quantize_block(task, spec)
    assert output_error(task, result) < 0.7 * output_error(task, RTN().quantize_block(task, RTNSpec()))
    assert result.linears.keys() == GATED.keys()
    assert result.parameters.keys() == {"norm.weight", "up.bias"}
    assert result.counters == {"scales_moved": 2, "scales_kept": 0}
    assert all(torch.equal(before[name], tensor) for name, tensor in task.block.state_dict().items())
    again = AWQ().quantize_block(replace(task, seed=99), spec)
    for name, linear in result.linears.items():
        assert torch.equal(linear.weight.codes, again.linears[name].weight.codes)


def test_without_rounding_the_block_computes_what_it_did() -> None:
    """In fp64, weights with the found scales in them and the changed parameters give the original output."""
    task = in_double(gated_task(GATED))
    result = AWQ().quantize_block(task, AWQSpec())
    weights = {}
    for name, linear in result.linears.items():
        assert not isinstance(linear.scaling.columns, float)
        assert (linear.scaling.columns.max() / linear.scaling.columns.min()) > 1.2, "a test of scales that are not 1"
        weights[f"{name}.weight"] = linear.scaling.apply(task.linear(name).weight)
        torch.testing.assert_close(linear.scaling.undo(weights[f"{name}.weight"]), task.linear(name).weight)
    with torch.no_grad():
        folded = functional_call(task.block, weights | result.parameters, task.inputs)
        halves = functional_call(task.block, weights, task.inputs)
    torch.testing.assert_close(folded, task.targets, rtol=1e-10, atol=1e-10)
    assert (halves - task.targets).abs().max() > 0.1


def in_double(task: BlockTask) -> BlockTask:
    block, hidden = task.block.double(), task.inputs.double()
    with torch.no_grad():
        return replace(task, inputs=hidden, inputs_fp=hidden, targets=block(hidden))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_is_what_the_stored_norm_divides_by(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(64)
    norm.weight.data = torch.randn(64).to(dtype)
    norm.weight.data[:2] = -offset
    block = nn.ModuleDict({"norm": norm})
    wanted = torch.rand(64) * 4 + 0.1
    scale, changed = settle(block, Fold("norm", (), "", offset=offset), wanted)
    before, after = (w.float() + offset for w in (norm.weight.detach(), changed["norm.weight"]))
    torch.testing.assert_close(after * scale, before, rtol=1e-6, atol=0)
    assert changed["norm.weight"].dtype == dtype
    assert torch.equal(scale[:2], torch.ones(2)), "a norm that puts out 0 has nothing to divide"
    torch.testing.assert_close(scale[2:], wanted[2:], rtol=0.3 if offset and dtype == torch.bfloat16 else 0.01, atol=0)


def test_candidates_are_judged_by_the_output_of_the_part() -> None:
    """The scale chosen is the one of twenty with the least error, computed from the formula."""
    task = gated_task(GATED)
    fold, magnitude = GATED_FOLDS[0], observe(task, task.inputs)["gate"].magnitude()
    lit = task.inputs.new_tensor([channel != 9 for channel in range(32)]).bool()
    with torch.no_grad():
        mean = nn.functional.rms_norm(task.inputs, (32,), task.block.get_parameter("norm.weight"), 1e-6).abs()
    torch.testing.assert_close(magnitude[lit], mean.flatten(0, 1).mean(0)[lit])
    errors, scales = [], []
    for step in range(20):
        s = magnitude ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        weights = {}
        for name in fold.linears:
            w = grouped(task.linear(name).weight * s, 16)
            to = affine_grid(GroupRange.of(w), W3, torch.float32)
            w_hat = (round_to_grid(w, to)[0] - to.zero.unsqueeze(-1)) * to.scale.unsqueeze(-1)  # type: ignore[union-attr]
            weights[f"{name}.weight"] = w_hat.view(48, 32) / s
        with torch.no_grad():
            out = functional_call(task.block, weights, task.inputs[:5])
        errors.append(float((out - task.targets[:5]).double().square().sum()))
        scales.append(s)
    best = min(range(20), key=errors.__getitem__)
    assert errors[best] < 0.9 * errors[0]
    with torch.no_grad():
        found = search_scale(task, fold, magnitude, task.inputs[:5])
    torch.testing.assert_close(found, scales[best])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("together", [3, 20])
def test_candidates_that_are_rounded_at_once_are_those_of_one_after_another(
    together: int, monkeypatch: pytest.MonkeyPatch, *, symmetric: bool
) -> None:
    """As on a GPU, with all sequences in one pass: errors are sums in another order, choices are the same."""
    scheme = W3.model_copy(update={"symmetric": symmetric})
    task = gated_task(dict.fromkeys(GATED, scheme))
    expected = AWQ().quantize_block(task, AWQSpec())
    monkeypatch.setattr(awq, "_together", lambda _: together)
    monkeypatch.setattr(awq, "fits_at_once", lambda *_: True)
    found = AWQ().quantize_block(task, AWQSpec())
    for name, linear in expected.linears.items():
        assert torch.equal(found.linears[name].weight.codes, linear.weight.codes)
        assert torch.equal(found.linears[name].affine.scale, linear.affine.scale)
        columns, theirs = found.linears[name].scaling.columns, linear.scaling.columns
        assert torch.equal(torch.as_tensor(columns), torch.as_tensor(theirs))


def test_a_search_that_finds_no_memory_for_all_sequences_takes_them_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    task, passes = gated_task(GATED), BlockTask.passes
    expected = AWQ().quantize_block(task, AWQSpec())
    refused: list[int] = []

    def pass_some(self: BlockTask, inputs: Tensor) -> Any:
        if self.micro_batch > task.micro_batch:
            refused.append(self.micro_batch)
            raise torch.OutOfMemoryError
        return passes(self, inputs)

    monkeypatch.setattr(BlockTask, "passes", pass_some)
    monkeypatch.setattr(awq, "fits_at_once", lambda *_: True)
    found = AWQ().quantize_block(task, AWQSpec())
    assert refused == [len(task.inputs)] * 2
    for name, linear in expected.linears.items():
        assert torch.equal(found.linears[name].weight.codes, linear.weight.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_is_clipped_where_its_products_gain(symmetric: bool) -> None:
    """Of the ten ranges, the one whose products with the inputs are closest, computed from the inputs themselves."""
    torch.manual_seed(2)
    scheme = Scheme(bits=3, group_size=8, symmetric=symmetric)
    w, x = torch.randn(6, 24, dtype=torch.float64), torch.randn(200, 24, dtype=torch.float64)
    w[:, 3] *= 4
    x[:, 3] *= 0.05  # large weights that hardly matter
    groups, parts = grouped(w, 8), x.view(200, 3, 8)
    found = clip_ranges(groups, 2 * torch.einsum("tgi,tgj->gij", parts, parts), scheme, torch.float32)
    costs = []
    for step in range(10):
        widest = groups.abs().amax(-1) * (1 - step / 20)
        low, high = groups.amin(-1).clamp(max=0).maximum(-widest), groups.amax(-1).clamp(min=0).minimum(widest)
        to = affine_grid(GroupRange(low, high), scheme, torch.float32)
        codes, _ = round_to_grid(groups, to)
        w_hat = (codes if to.zero is None else codes - to.zero.unsqueeze(-1)) * to.scale.unsqueeze(-1)
        costs.append(torch.einsum("ogi,tgi->ogt", w_hat - groups, parts).square().sum(-1))
    best = torch.stack(costs).argmin(0)
    m = groups.abs().amax(-1) * (1 - best / 20)
    torch.testing.assert_close(found.low, groups.amin(-1).clamp(max=0).maximum(-m))
    torch.testing.assert_close(found.high, groups.amax(-1).clamp(min=0).minimum(m))
    assert len(best.unique()) > 3


def test_linears_whose_output_only_decides_a_softmax_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[tuple[int, ...]] = []

    def note(w: Tensor, *_: object) -> GroupRange:
        clipped.append(tuple(w.shape))
        return GroupRange.of(w)

    monkeypatch.setattr(awq, "clip_ranges", note)
    folds = (replace(GATED_FOLDS[0], unclipped=("gate",)), GATED_FOLDS[1])
    AWQ().quantize_block(gated_task(GATED, folds=folds), AWQSpec())
    assert clipped == [(48, 2, 16), (32, 1, 48)]
    AWQ().quantize_block(gated_task(GATED, folds=folds), AWQSpec(clip_search=False))
    assert len(clipped) == 2


@pytest.mark.parametrize(
    ("missing", "changed"), [("gate", {"up.bias"}), ("up", set()), ("down", {"norm.weight"})], ids=str
)
def test_no_scale_moves_through_a_linear_that_keeps_its_weight(missing: str, changed: set[str]) -> None:
    task = gated_task({name: scheme for name, scheme in GATED.items() if name != missing})
    result = AWQ().quantize_block(task, AWQSpec())
    assert result.parameters.keys() == changed
    assert result.counters["scales_moved"] == len(changed)
    assert output_error(task, result) < output_error(task, RTN().quantize_block(task, RTNSpec()))


def test_no_scale_moves_where_the_source_has_fewer_outputs() -> None:
    task = gated_task(GATED, folds=(Fold("down", ("up",), "up"), Fold("gate", ("down",), "down")))
    assert [awq._applies(task, fold) for fold in task.folds] == [True, True]
    narrow = nn.Linear(32, 24)
    task.block.set_submodule("gate", narrow)
    assert [awq._applies(task, fold) for fold in task.folds] == [True, False]


def test_original_inputs_are_observed_unless_told_otherwise() -> None:
    task = gated_task(GATED)
    other: dict[str, Any] = {"inputs": task.inputs.roll(3, dims=-1)}
    original, same, changed = (
        AWQ().quantize_block(replace(task, **fields), AWQSpec(quantized_inputs=quantized)).linears["up"].weight
        for fields, quantized in (({}, False), (other, False), (other, True))
    )
    assert torch.equal(original.codes, same.codes)
    assert not torch.equal(original.codes, changed.codes)


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_whose_error_is_not_finite_is_not_chosen(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One overflow in fp16 must not decide: the best of the others is taken."""
    task, real = gated_task(GATED), awq._scale
    magnitude = observe(task, task.inputs)["gate"].magnitude()
    best = search_scale(task, GATED_FOLDS[0], magnitude, task.inputs)
    alphas = [step / 20 for step in range(20)]
    assert torch.allclose(best, next(real(magnitude, a) for a in alphas if torch.equal(real(magnitude, a), best)))

    def spoilt(x: Tensor, alpha: float) -> Tensor:
        return torch.full_like(x, value) if alpha in (0.05, 0.95) else real(x, alpha)

    monkeypatch.setattr(awq, "_scale", spoilt)
    found = search_scale(task, GATED_FOLDS[0], magnitude, task.inputs)
    assert bool(found.isfinite().all())
    assert torch.equal(found, best)


def test_scales_are_the_formula_and_end_at_a_ten_thousandth() -> None:
    x = torch.tensor([4.0, 1.0, 0.25])
    torch.testing.assert_close(awq._scale(x, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    torch.testing.assert_close(awq._scale(x, 0.0), torch.ones(3))
    tiny = awq._scale(torch.tensor([1.0, 1e-30]), 0.5)
    torch.testing.assert_close(tiny, torch.tensor([100.0, 0.01]))


def test_columns_that_no_token_lit_count_as_mean_ones() -> None:
    seen = awq.Observed(torch.zeros(4), {})
    seen.add(torch.tensor([[3.0, -1.0, 0.0, 2.0], [1.0, 1.0, 0.0, -6.0]]))
    torch.testing.assert_close(seen.magnitude(), torch.tensor([2.0, 1.0, 1.75, 4.0]))
    nothing = awq.Observed(torch.zeros(4), {})
    nothing.add(torch.zeros(2, 4))
    assert bool((nothing.magnitude() > 0).all())
    assert bool(awq._scale(nothing.magnitude(), 0.95).isfinite().all())


def test_no_scale_moves_through_a_norm_that_its_dtype_would_turn_into_zero() -> None:
    """-1 + 2^-8 is what bf16 has next to -1: over 10 it would be -1, whose factor of 0 divides by nothing."""
    norm = nn.RMSNorm(4)
    norm.weight.data = torch.tensor([-1 + 2**-8, 0.0, 1.0, 0.5]).bfloat16()
    wanted = torch.tensor([10.0, 2.0, 2.0, 2.0])
    scale, changed = settle(nn.ModuleDict({"norm": norm}), Fold("norm", (), "", offset=1.0), wanted)
    assert scale[0] == 1
    assert changed["norm.weight"][0] == norm.weight[0]
    torch.testing.assert_close(scale[1:], wanted[1:], rtol=0.02, atol=0)


def test_where_all_inputs_are_zero_weights_are_rounded_to_nearest() -> None:
    task = gated_task({name: GATED[name] for name in ("gate", "up")})
    silent = replace(task, inputs=torch.zeros_like(task.inputs), inputs_fp=torch.zeros_like(task.inputs))
    result = AWQ().quantize_block(silent, AWQSpec())
    for name, linear in RTN().quantize_block(task, RTNSpec()).linears.items():
        assert torch.equal(result.linears[name].weight.codes, linear.weight.codes)
