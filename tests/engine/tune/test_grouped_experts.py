"""Experts at once against experts one by one, and against autograd through transformers' own module."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from tests.methods.toy_experts import INNER, NUMBER, STARVED, WIDTH, RoutedBlock, fused, routed_task
from workers.contracts.blocks import BlockTask
from workers.contracts.experts import experts_of
from workers.contracts.tuning import TuningSettings
from workers.engine.tune.grouped_experts import product, weight_gradients
from workers.engine.tune.tuned_block import FlatWeights, TunedBlock
from workers.methods.sign_round import rounded_weights
from workers.numerics.quantized import LinearResult

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)


class Plain:
    """Trainable weights that are the block's own."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        self.value = torch.cat([weight.flatten() for weight in weights.values()])

    def results(self) -> dict[str, LinearResult]:
        return {}


def tuned(task: BlockTask) -> TunedBlock:
    """The block of a task as the loop has it, its weights written."""
    groups = [Plain(weights) for weights in task.alike().values()]
    block = TunedBlock.of(task, cast("Any", groups))  # only their shapes are asked for
    for group, flat in zip(groups, block.flats, strict=True):
        flat.value.copy_(group.value)
    return block


def one_by_one(block: TunedBlock) -> TunedBlock:
    for part in experts_of(block.module).values():
        object.__setattr__(part, "joined", None)
    return block


def gradients(block: TunedBlock, hidden: Tensor, target: Tensor, parts: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the squared error in some parts."""
    outputs = []
    for number, (rows, wanted) in enumerate(zip(hidden.chunk(parts), target.chunk(parts), strict=True)):
        block.begin(adds=number > 0)
        output = block.module(rows)
        (output - wanted).square().sum().backward()
        outputs.append(output.detach())
    return torch.cat(outputs), [flat.gradient.clone() for flat in block.flats]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_at_once_is_one_by_one(kind: str, parts: int) -> None:
    task = routed_task(kind, SCHEME, samples=6)
    target = torch.randn(task.inputs.shape)
    grouped, single = tuned(task), one_by_one(tuned(task))
    assert all(part.joined is not None for part in experts_of(grouped.module).values())
    (output, found), (expected, wanted) = (gradients(b, task.inputs, target, parts) for b in (grouped, single))
    torch.testing.assert_close(output, expected)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_autograds_through_the_fused_module(kind: str, grouped: bool) -> None:
    task = routed_task(kind, SCHEME, samples=4)
    block = tuned(task) if grouped else one_by_one(tuned(task))
    target = torch.randn(task.inputs.shape)
    output, found = gradients(block, task.inputs, target)
    original, _, _ = fused(kind, torch.float32, torch.Generator().manual_seed(6))
    theirs = task.block
    experts, theirs.experts = theirs.experts, original
    expected = theirs(task.inputs)
    (expected - target).square().sum().backward()
    theirs.experts = experts
    torch.testing.assert_close(output, expected.detach())
    flat = dict(zip(names_in(block.flats), torch.split(torch.cat(found), sizes_in(block.flats)), strict=True))
    for expert in range(NUMBER):
        both, down = (gradient_of(original, name)[expert] for name in ("gate_up_proj", "down_proj"))
        if kind == "gpt_oss":
            gate, up, down = both.T[0::2], both.T[1::2], down.T
        else:
            gate, up = both.chunk(2)
        for name, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            mine = flat[f"experts.{expert}.{name}"].view(wanted.shape)
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def gradient_of(module: nn.Module, name: str) -> Tensor:
    gradient = module.get_parameter(name).grad
    assert gradient is not None
    return gradient


def names_in(flats: tuple[FlatWeights, ...]) -> list[str]:
    return [name for flat in flats for name in flat.shapes]


def sizes_in(flats: tuple[FlatWeights, ...]) -> list[int]:
    return [out * width for flat in flats for out, width in flat.shapes.values()]


@pytest.mark.parametrize("grouped", [True, False])
def test_an_expert_without_tokens_has_no_gradient_even_after_one_that_had(grouped: bool) -> None:
    task = routed_task(scheme=SCHEME, samples=4)
    block = tuned(task) if grouped else one_by_one(tuned(task))
    _, before = gradients(block, task.inputs, torch.zeros_like(task.inputs))
    cast("RoutedBlock", block.module).starves = True
    _, after = gradients(block, task.inputs, torch.zeros_like(task.inputs))
    starved = [name.startswith(f"experts.{STARVED}.") for name in names_in(block.flats)]
    for name_starves, old, new in zip(
        starved, *(torch.split(torch.cat(g), sizes_in(block.flats)) for g in (before, after)), strict=True
    ):
        assert bool((new == 0).all()) is name_starves
        assert bool((old != 0).any())


def test_experts_of_other_schemes_are_computed_one_by_one() -> None:
    task = routed_task(scheme=SCHEME, samples=2)
    other = replace(task, schemes={**task.schemes, "experts.3.up_proj": Scheme(bits=8, group_size=16, symmetric=True)})
    block = tuned(other)
    assert experts_of(block.module)["experts"].joined is None
    target = torch.randn(task.inputs.shape)
    output, _ = gradients(block, task.inputs, target)
    torch.testing.assert_close(output, task.block(task.inputs))


def test_whole_rows_as_groups_lie_in_two_buffers() -> None:
    task = routed_task(scheme=Scheme(bits=4, group_size=-1, symmetric=True), samples=2)
    block = tuned(task)
    assert len(block.flats) == 2
    assert experts_of(block.module)["experts"].joined is not None
    output, _ = gradients(block, task.inputs, torch.zeros_like(task.inputs))
    torch.testing.assert_close(output, task.block(task.inputs))


@pytest.mark.parametrize("widths", [(WIDTH, INNER), (WIDTH + 1, INNER - 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grouped_product_is_each_experts(widths: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(20, widths[0], dtype=dtype), torch.randn(4, widths[0], widths[1], dtype=dtype)
    ends = torch.tensor([5, 5, 18, 20], dtype=torch.int32)
    parts = [x[:5], x[5:5], x[5:18], x[18:]]
    y = product(x, weight, ends)
    torch.testing.assert_close(y, torch.cat([part @ w for part, w in zip(parts, weight, strict=True)]))
    expected = torch.stack([a.T @ b for a, b in zip(torch.split(y, [5, 0, 13, 2]), parts, strict=True)])
    torch.testing.assert_close(weight_gradients(y, x, ends), expected)


def test_tuning_experts_at_once_gives_what_one_by_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(TunedBlock, "_experts", lambda *_: None)
        task = routed_task(scheme=SCHEME, samples=96)
        settings = TuningSettings(30, 8, 1 / 30)
        outcome = task.tune(task, rounded_weights(task, search=False, settings=settings), settings)
        results.append(outcome)
    assert float(results[0].loss) < 0.9 * float(results[0].loss_initial)
    same = [
        float((results[0].linears[name].weight.codes == other.weight.codes).float().mean())
        for name, other in results[1].linears.items()
    ]
    assert min(same) > 0.98, "signs of gradients near zero may differ, and little else"
    assert isinstance(task.block, nn.Module)
