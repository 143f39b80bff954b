"""ApiQ: a step equals autograd in fp64, the start is what it says, and what is trained is what is returned."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import ApiQSpec, RTNSpec, Scheme, SignRoundSpec
from bitwright.errors import InvalidRequest
from tests.methods.test_sign_round import RoundSTE
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.layer_tasks import SideBySide, quantize_in_order, same_inputs
from workers.methods.apiq import ApiQ, corrected_weights
from workers.methods.rtn import RTN, quantize_weight
from workers.numerics.clipping.clipped_groups import ClippedGroups
from workers.numerics.quantized import LinearResult

SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((2, 4), (16, -1), (True, False))
]
TWO = Scheme(bits=2, group_size=16, symmetric=False)
FAST: dict[str, Any] = {"bits": 2, "rank": 4, "steps": 60, "batch_size": 4}


def double_task(schemes: dict[str, Scheme]) -> BlockTask:
    task = toy_task(schemes)
    return replace(task, block=task.block.double(), scale_dtype=torch.float64)


def by_autograd(
    weight: Tensor, scheme: Scheme, logits: Tensor, a: Tensor, b: Tensor, strength: float, v: Tensor | float = 0
) -> Tensor:
    """W_hat by the paper's formula, differentiable: an independent writing of it."""
    group = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    w, rounded = weight.reshape(-1, group), RoundSTE.apply
    low = torch.sigmoid(logits[0]) * w.min(-1).values.clamp(max=0)
    high = torch.sigmoid(logits[1]) * w.max(-1).values.clamp(min=0)
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        s = (torch.where(-low > high, -low, -high) / half)[:, None]
        q = s * torch.clamp(rounded(w / s + v), -half, half - 1)
    else:
        top = 2**scheme.bits - 1
        s = ((high - low) / top)[:, None]
        z = torch.round(-low[:, None] / s).detach()
        q = s * (torch.clamp(rounded(w / s + v) + z, 0, top) - z)
    w_hat: Tensor = q.view_as(weight) + strength * b @ a
    return w_hat


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_and_two_steps_equal_autograd_and_torch_s_adamw_in_fp64(scheme: Scheme) -> None:
    task = double_task({"up": scheme})
    spec = ApiQSpec(bits=scheme.bits, rank=5, alpha=20, weight_decay=0.1)
    (trained,) = corrected_weights(task, spec, {})
    assert isinstance(trained.base, ClippedGroups)
    weight = task.linear("up").weight.detach()
    torch.manual_seed(0)
    trained.factors += 0.05 * torch.randn_like(trained.factors)
    trained.base.logits += torch.randn_like(trained.base.logits)
    a, b = (part.clone() for part in trained.factors.split([5 * 32, 48 * 5]))
    a, b = a.view(5, 32).requires_grad_(), b.view(48, 5).requires_grad_()
    logits = trained.base.logits.clone().requires_grad_()
    groups = [
        {"params": [logits], "lr": spec.range_learning_rate},
        {"params": [a, b], "lr": spec.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, eps=1e-15)
    out = torch.empty(weight.numel(), dtype=torch.float64)
    for _ in range(2):
        w_hat = by_autograd(weight, scheme, logits, a, b, 4.0)
        trained.write(out)
        assert torch.allclose(out.view_as(w_hat), w_hat, rtol=0, atol=1e-12)
        d = torch.randn_like(w_hat)
        optimizer.zero_grad()
        w_hat.backward(d)
        assert a.grad is not None
        assert b.grad is not None
        assert logits.grad is not None
        expected = torch.cat([a.grad.flatten(), b.grad.flatten()])
        assert torch.allclose(trained.factor_gradients(d.flatten()), expected, atol=1e-11)
        found = trained.base.gradients(d.view(trained.base.weight.shape))
        assert torch.allclose(found, logits.grad, atol=1e-11)
        optimizer.step()
        trained.step(d.flatten(), torch.tensor(spec.range_learning_rate, dtype=torch.float64), out)
        assert torch.allclose(trained.base.logits, logits, atol=1e-10)
        assert torch.allclose(trained.factors, torch.cat([a.flatten(), b.flatten()]), atol=1e-10)


def test_at_the_start_the_factors_add_nothing_and_ranges_are_clipped_by_the_papers_factor() -> None:
    task = double_task({"up": TWO, "down": TWO})
    (trained,) = corrected_weights(task, ApiQSpec(bits=2, rank=4), {})
    out = torch.empty(2 * 32 * 48, dtype=torch.float64)
    trained.write(out)
    for name, w_hat in zip(("up", "down"), out.split(32 * 48), strict=True):
        w = task.linear(name).weight.detach()
        four = torch.full((2, w.numel() // 16), 4.0, dtype=torch.float64)
        nothing = torch.zeros(1, w.shape[1], dtype=torch.float64), torch.zeros(w.shape[0], 1, dtype=torch.float64)
        assert torch.allclose(w_hat.view_as(w), by_autograd(w, TWO, four, *nothing, 1.0), atol=1e-12)
    a = trained.factors[: 4 * 32]
    assert 0.9 / 32**0.5 < a.abs().max() <= 1 / 32**0.5


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_calibrated_point_itself(granularity: str, dtype: torch.dtype) -> None:
    """The held-out loss that the tuner measured is that of the returned weights, factors rounded as they are stored."""
    task = toy_task({"up": TWO, "down": TWO})
    task = replace(task, block=task.block.to(dtype), inputs=task.inputs.to(dtype), inputs_fp=task.inputs_fp.to(dtype))
    task = replace(task, targets=task.targets.to(dtype), scale_dtype=dtype)
    before = {name: t.clone() for name, t in task.block.state_dict().items()}
    result = ApiQ().quantize_block(task, ApiQSpec.model_validate(FAST | {"granularity": granularity, "alpha": 2}))
    assert all(torch.equal(t, before[name]) for name, t in task.block.state_dict().items())
    assert list(result.linears) == ["up", "down"]
    for linear in result.linears.values():
        assert linear.low_rank is not None
        assert (linear.low_rank.rank, linear.low_rank.alpha) == (4, 2)
        assert linear.low_rank.b.abs().max() > 0
        assert linear.low_rank.a.dtype == dtype
    if granularity == "block":
        order = torch.randperm(32, generator=torch.Generator().manual_seed(task.seed))[:4]
        with torch.no_grad():
            for name, linear in result.linears.items():
                task.linear(name).weight = nn.Parameter(linear.dequantize())
            loss = (task.block(task.inputs[order]) - task.targets[order]).float().square().mean()
            wide = task.block.float()(task.inputs[order].float()) - task.targets[order].float()
        # Products of a block in bf16 may be made in fp32, where a processor is quicker so.
        assert result.loss in (
            pytest.approx(float(loss), rel=1e-5),
            pytest.approx(float(wide.square().mean()), rel=1e-5),
        )
        assert result.loss_initial is not None
        assert result.loss is not None
        assert result.loss < 0.8 * result.loss_initial


def output_error(task: BlockTask, linears: dict[str, LinearResult]) -> float:
    weights = {name: task.linear(name).weight for name in linears}
    try:
        for name, linear in linears.items():
            task.linear(name).weight = nn.Parameter(linear.dequantize())
        with torch.no_grad():
            return float((task.block(task.inputs) - task.targets).square().mean())
    finally:
        for name, weight in weights.items():
            task.linear(name).weight = weight


@pytest.mark.parametrize("fields", [{}, {"granularity": "layer"}, {"aug_loss": True}, {"base": "signround"}], ids=str)
def test_outputs_are_nearer_than_round_to_nearest_s(fields: dict[str, Any]) -> None:
    task = toy_task({"up": TWO, "down": TWO})
    spec = ApiQSpec.model_validate(FAST | {"learning_rate": 5e-3} | fields)
    ours = ApiQ().quantize_block(task, spec)
    rounded = RTN().quantize_block(task, RTNSpec(bits=2))
    assert output_error(task, ours.linears) < 0.6 * output_error(task, rounded.linears)
    again = ApiQ().quantize_block(task, spec)
    assert all(torch.equal(r.dequantize(), again.linears[n].dequantize()) for n, r in ours.linears.items())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_starts_from_the_codes_and_scales_of_its_base(*, symmetric: bool, frozen: bool) -> None:
    scheme = Scheme(bits=2, group_size=16, symmetric=symmetric)
    task = toy_task({"up": scheme, "down": scheme})
    fields = {"bits": 2, "rank": 4, "steps": 0, "base": "signround", "freeze_base": frozen, "symmetric": symmetric}
    spec = ApiQSpec.model_validate(fields)
    base = task.quantize(task, spec.base_spec())
    assert isinstance(spec.base_spec(), SignRoundSpec)
    found = ApiQ().quantize_block(task, spec)
    for name, linear in found.linears.items():
        ours, theirs = linear.affine, base.linears[name].affine
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.allclose(ours.scale, theirs.scale, rtol=1e-6)
        plain = quantize_weight(task.linear(name).weight.detach(), scheme, torch.float32)
        assert not torch.equal(ours.codes, plain.codes), "SignRound rounds otherwise"


def test_a_frozen_base_stays_while_the_factors_learn() -> None:
    task = toy_task({"up": TWO, "down": TWO})
    spec = ApiQSpec.model_validate(FAST | {"freeze_base": True, "learning_rate": 5e-3})
    found, rounded = ApiQ().quantize_block(task, spec), RTN().quantize_block(task, RTNSpec(bits=2))
    for name, linear in found.linears.items():
        assert torch.equal(linear.weight.dequantize(), rounded.linears[name].dequantize())
    assert output_error(task, found.linears) < 0.8 * output_error(task, rounded.linears)


def test_layers_are_taken_as_they_are_called_each_with_its_own_targets_and_quantized_inputs() -> None:
    task = toy_task({"down": TWO, "up": TWO})
    assert same_inputs(task) == [["up"], ["down"]]
    parts: list[BlockTask] = []

    def quantize(part: BlockTask) -> dict[str, LinearResult]:
        parts.append(part)
        weights = {name: part.linear(name).weight.detach() for name in part.schemes}
        return {name: LinearResult(quantize_weight(w, TWO, torch.float32)) for name, w in weights.items()}

    shifted = replace(task, inputs=task.inputs + 0.1)
    results = quantize_in_order(shifted, quantize)
    up, down, act = task.linear("up"), task.linear("down"), nn.functional.silu
    with torch.no_grad():
        assert torch.equal(parts[0].inputs, shifted.inputs)
        assert torch.allclose(parts[0].targets, up(task.inputs_fp))
        inner = act(nn.functional.linear(shifted.inputs, results["up"].dequantize(), up.bias))
        assert torch.allclose(parts[1].inputs, inner, atol=1e-5)
        assert torch.allclose(parts[1].targets, down(act(up(task.inputs_fp))), atol=1e-5)


def test_linears_of_one_input_share_a_task() -> None:
    both = SideBySide({"a.q": nn.Linear(4, 3), "a.k": nn.Linear(4, 2)})
    x = torch.randn(2, 5, 4)
    assert both(x).shape == (2, 5, 5)
    task = toy_task({"a.q": TWO, "a.k": TWO})
    task = replace(task, block=both, inputs_fp=x)
    assert same_inputs(task) == [["a.q", "a.k"]]
    with pytest.raises(InvalidRequest, match="one by one") as refused:
        same_inputs(replace(task, forward=lambda _, hidden: hidden))
    assert refused.value.field == "quantization.granularity"


def test_the_augmented_target_has_the_gradient_of_both_losses() -> None:
    task = replace(double_task({"up": TWO}), inputs=torch.randn(3, 4, 32, dtype=torch.float64))
    task = replace(task, targets=torch.randn(3, 4, 32, dtype=torch.float64), micro_batch=2)
    own = task.block(task.inputs).detach()
    y = torch.randn_like(own).requires_grad_()
    both = (y - task.targets).square().mean() + (y - own).square().mean()
    mean = 2 * (y - task.augmented().targets).square().mean()
    expected, found = (torch.autograd.grad(loss, y)[0] for loss in (both, mean))
    assert torch.allclose(found, expected)


def test_the_start_is_drawn_by_the_block_s_seed_within_the_paper_s_bounds() -> None:
    starts = []
    for seed in (7, 7, 8):
        (trained,) = corrected_weights(replace(double_task({"up": TWO}), seed=seed), ApiQSpec(bits=2, rank=4), {})
        starts.append(trained.factors)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not starts[0][4 * 32 :].any()
    a, bound = starts[0][: 4 * 32], 32**-0.5  # uniform within 1/sqrt(in) on both sides
    assert float(a.abs().max()) <= bound
    assert float(a.min()) < -0.8 * bound
    assert float(a.max()) > 0.8 * bound
    assert abs(float(a.mean())) < 0.2 * bound
