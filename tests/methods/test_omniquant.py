"""OmniQuant against its formula: its step is autograd's with torch's AdamW, and unclipped it rounds to nearest."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import OmniQuantSpec, RTNSpec, Scheme
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.tuning import TrainableWeights, TuningOutcome, TuningSettings
from workers.methods.omniquant import ClippedWeights, OmniQuant, clipping_gradients
from workers.methods.rtn import RTN
from workers.numerics.clipping import clipped_groups

SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (16, -1), (True, False))
]
W3 = Scheme(bits=3, group_size=16, symmetric=False)
RATE = 0.05


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def by_autograd(weight: Tensor, scheme: Scheme, lower: Tensor, upper: Tensor) -> Tensor:
    """w_hat by the paper's formula, differentiable; an independent writing of it."""
    group = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    w = weight.view(-1, group)
    low = torch.sigmoid(lower) * w.min(-1).values.clamp(max=0)
    high = torch.sigmoid(upper) * w.max(-1).values.clamp(min=0)
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        s = (torch.where(-low > high, -low, -high) / half)[..., None]
        symmetric: Tensor = s * torch.clamp(RoundSTE.apply(w / s), -half, half - 1)
        return symmetric.view_as(weight)
    top = 2**scheme.bits - 1
    s = (high - low) / top
    z = (-low / s).detach().round()[..., None]
    asymmetric: Tensor = s[..., None] * (torch.clamp(RoundSTE.apply(w / s[..., None]) + z, 0, top) - z)
    return asymmetric.view_as(weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_steps_equal_autograd_and_adamw_in_fp64(scheme: Scheme) -> None:
    torch.manual_seed(2)
    weight = torch.randn(12, 48, dtype=torch.float64)
    inputs, target = torch.randn(20, 48, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    width = 48 if scheme.group_size == -1 else scheme.group_size
    ours = ClippedWeights({"only": weight}, scheme, width, torch.float64)
    lower, upper = (row.clone().requires_grad_() for row in ours.groups.logits)
    optimizer = torch.optim.AdamW([lower, upper], lr=RATE, weight_decay=0, eps=1e-15)
    w_hat = torch.empty_like(weight)
    for _ in range(6):
        expected = by_autograd(weight, scheme, lower, upper)
        ours.write(w_hat)
        torch.testing.assert_close(w_hat, expected.detach(), rtol=1e-13, atol=1e-14)
        optimizer.zero_grad()
        (d,) = torch.autograd.grad(((inputs @ expected.T - target) ** 2).mean(), expected, retain_graph=True)
        lower.grad, upper.grad = torch.autograd.grad(expected, (lower, upper), d)
        found = ours.groups.gradients(d.view(ours.groups.weight.shape))
        torch.testing.assert_close(found, torch.stack([lower.grad, upper.grad]), rtol=1e-10, atol=1e-14)
        state = (ours.groups.weight, ours.groups.logits, d.view(ours.groups.weight.shape))
        plain = clipping_gradients(*state, scheme, torch.float64)
        torch.testing.assert_close(plain, found, rtol=1e-10, atol=1e-14)
        ours.step(d.flatten(), torch.tensor(RATE, dtype=torch.float64), w_hat.flatten())
        optimizer.step()
        torch.testing.assert_close(ours.groups.logits, torch.stack([lower, upper]).detach(), rtol=1e-10, atol=1e-12)
    assert (ours.groups.logits - clipped_groups.START).abs().max() > 4 * RATE


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unclipped_it_is_round_to_nearest(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipped_groups, "START", math.inf)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    nearest = RTN().quantize_block(task, RTNSpec()).linears
    frozen = OmniQuant().quantize_block(task, OmniQuantSpec(epochs=0)).linears
    for name, result in nearest.items():
        assert torch.equal(result.weight.codes, frozen[name].weight.codes)
        assert torch.equal(result.affine.scale, frozen[name].affine.scale)


@pytest.mark.parametrize("aug_loss", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_tuning_lowers_the_block_error_and_leaves_the_block_as_it_was(bits: int, aug_loss: bool) -> None:
    scheme = Scheme(bits=bits, group_size=16, symmetric=False)
    task = toy_task(schemes={"up": scheme, "down": scheme})
    task = replace(task, inputs=task.inputs + 0.1 * torch.randn_like(task.inputs))
    before = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    spec = OmniQuantSpec(epochs=8, batch_size=4, learning_rate=0.03, aug_loss=aug_loss)
    result = OmniQuant().quantize_block(task, spec)
    assert result.loss is not None
    assert result.loss_initial is not None
    assert result.loss < 0.95 * result.loss_initial
    assert result.counters["best_step"] > 20
    assert result.counters["nan_gradients"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in task.block.state_dict().items())
    assert all(isinstance(task.linear(name), nn.Linear) for name in ("up", "down"))


def test_the_same_seed_gives_the_same_codes_and_another_seed_others() -> None:
    task = toy_task(schemes={"up": W3, "down": W3})
    spec = OmniQuantSpec(epochs=2, learning_rate=0.05)
    first, second = (OmniQuant().quantize_block(task, spec).linears["up"].weight for _ in range(2))
    other = OmniQuant().quantize_block(replace(task, seed=99), spec).linears["up"].weight
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, other.codes)


def test_the_augmented_target_stands_for_both_losses() -> None:
    """The sum of both losses less twice the loss to the mean target is the same whatever the block puts out."""
    task = toy_task(schemes={"up": W3})
    block, hidden = task.block.double(), task.inputs.double()
    with torch.no_grad():
        task = replace(task, inputs=hidden + 0.3 * torch.randn_like(hidden), targets=block(hidden))
        own, mean = block(task.inputs), task.augmented().targets
    rests = []
    for seed in range(3):
        torch.manual_seed(seed)
        output = torch.randn_like(mean)
        both = sum(float((output - target).square().mean()) for target in (task.targets, own))
        rests.append(both - 2 * float((output - mean).square().mean()))
    assert rests == pytest.approx([rests[0]] * 3, rel=1e-9)
    assert rests[0] > 0.01
    assert task.augmented().inputs is task.inputs


def test_a_gradient_with_nan_moves_nothing_and_is_counted() -> None:
    weights = ClippedWeights({"only": torch.randn(4, 32)}, W3, 16, torch.float32)
    d = torch.ones(4 * 32)
    d[0] = math.nan
    weights.step(d, torch.tensor(RATE), torch.empty_like(d))
    assert weights.faults() == 1
    assert torch.equal(weights.groups.logits[:, 0], torch.full((2,), clipped_groups.START))
    assert (weights.groups.logits[:, 1:] != clipped_groups.START).any()
    weights.restart()
    assert weights.faults() == 0
    assert torch.equal(weights.groups.logits, torch.full_like(weights.groups.logits, clipped_groups.START))


def test_the_augmented_loss_is_what_is_tuned_to_when_asked_for() -> None:
    """The loop is given the mean of both targets, and codes come out otherwise."""
    task = toy_task(schemes={"up": W3, "down": W3})
    task = replace(task, inputs=task.inputs + 0.3 * torch.randn_like(task.inputs))
    with torch.no_grad():
        own = task.block(task.inputs)
    targets: list[Tensor] = []
    loop = task.tune

    def tune(task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings) -> TuningOutcome:
        targets.append(task.targets)
        return loop(task, weights, settings)

    spec = OmniQuantSpec(epochs=4, batch_size=4, learning_rate=0.05)
    plain, augmented = (
        OmniQuant().quantize_block(replace(task, tune=tune), spec.model_copy(update={"aug_loss": aug_loss}))
        for aug_loss in (False, True)
    )
    assert torch.equal(targets[0], task.targets)
    torch.testing.assert_close(targets[1], (task.targets + own) / 2)
    assert not torch.equal(plain.linears["up"].weight.codes, augmented.linears["up"].weight.codes)
