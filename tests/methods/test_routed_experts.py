"""Methods on experts, whose linears see only the tokens that are sent to them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import AWQSpec, GPTQSpec, NormalFloatSpec, RTNSpec, Scheme
from tests.methods.toy_experts import INNER, NUMBER, STARVED, WIDTH, routed_task
from workers.contracts.blocks import BlockTask
from workers.contracts.experts import all_called, experts_of, seen_together
from workers.engine.quantize.registry import METHODS
from workers.methods import gptq
from workers.methods.gptq import Elimination
from workers.methods.rtn import quantize_weight
from workers.numerics.hessian import input_groups

SCHEME = Scheme(bits=3, group_size=16, symmetric=True)
SPECS = {
    "rtn": RTNSpec(method="rtn", bits=3, group_size=16),
    "gptq": GPTQSpec(method="gptq", bits=3, group_size=16, act_order=False),
    "awq": AWQSpec(method="awq", bits=3, group_size=16),
    "nf": NormalFloatSpec(method="nf", bits=4, group_size=16),
}


def rows_of(task: BlockTask) -> list[Tensor]:
    """The tokens of each expert, one by one from the router's choice."""
    hidden = task.inputs.reshape(-1, WIDTH)
    scores = hidden @ task.block.route.T  # type: ignore[operator]
    chosen = scores.softmax(-1).topk(2).indices
    return [hidden[(chosen == expert).any(-1)] for expert in range(NUMBER)]


@pytest.mark.parametrize("method", SPECS)
def test_every_linear_of_every_expert_has_a_result_even_without_tokens(method: str) -> None:
    task = routed_task(scheme=SCHEME, samples=1, starves=True)
    result = METHODS[method].quantize_block(task, SPECS[method])
    assert result.linears.keys() == task.schemes.keys()
    for name, linear in result.linears.items():
        value = linear.dequantize()
        assert value.isfinite().all()
        assert (value - task.linear(name).weight).norm() < 0.5 * task.linear(name).weight.norm(), name


def test_the_hessian_of_an_expert_is_of_its_own_tokens() -> None:
    task = routed_task(scheme=SCHEME, samples=16)
    result = METHODS["gptq"].quantize_block(task, SPECS["gptq"])
    for expert, rows in enumerate(rows_of(task)):
        elimination = Elimination.of(2 * rows.T @ rows, SPECS["gptq"].damping, act_order=False)  # type: ignore[attr-defined]
        assert elimination is not None
        for name in ("gate_proj", "up_proj"):
            weight = task.linear(f"experts.{expert}.{name}").weight
            expected = gptq.quantize_weight(weight, elimination, SCHEME, torch.float32)
            found = result.linears[f"experts.{expert}.{name}"].weight
            assert (found.codes == expected.codes).float().mean() > 0.999


def test_a_starved_experts_hessian_is_of_every_token_where_it_sees_them() -> None:
    task = routed_task(scheme=SCHEME, samples=16, starves=True)
    experts_of(task.block)["experts"].complete = frozenset({STARVED})
    found = METHODS["gptq"].quantize_block(task, SPECS["gptq"]).linears[f"experts.{STARVED}.gate_proj"].weight
    rows = task.inputs.reshape(-1, WIDTH)
    elimination = Elimination.of(2 * rows.T @ rows, SPECS["gptq"].damping, act_order=False)  # type: ignore[attr-defined]
    assert elimination is not None
    weight = task.linear(f"experts.{STARVED}.gate_proj").weight
    expected = gptq.quantize_weight(weight, elimination, SCHEME, torch.float32)
    assert (found.codes == expected.codes).float().mean() > 0.999
    assert not torch.equal(found.codes, quantize_weight(weight, SCHEME, torch.float32).codes)


def test_hessians_of_few_experts_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = routed_task(scheme=SCHEME, samples=8)
    at_once = METHODS["gptq"].quantize_block(task, SPECS["gptq"]).linears
    monkeypatch.setattr(gptq, "HESSIAN_BYTES", 4 * WIDTH * WIDTH * 5)
    in_parts = METHODS["gptq"].quantize_block(task, SPECS["gptq"]).linears
    for name, linear in at_once.items():
        assert torch.equal(linear.weight.codes, in_parts[name].weight.codes)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1 << 29, 4 * WIDTH * (WIDTH + 2 * INNER) * 5])
def test_experts_that_are_rounded_side_by_side_get_the_codes_of_each_alone(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Triton's kernels, all of a part at once, and five at a time; one without tokens among them."""
    kernels = pytest.importorskip("workers.numerics.backends.column_kernels")
    task = routed_task(scheme=SCHEME, samples=8, starves=True)
    monkeypatch.setattr(gptq, "column_kernels", lambda *_: kernels)
    sizes: list[int] = []
    one_launch = gptq.quantize_weights

    def count(weights: Sequence[Tensor], *given: Any) -> Any:
        sizes.append(len(weights))
        return one_launch(weights, *given)

    monkeypatch.setattr(gptq, "quantize_weights", count)
    monkeypatch.setattr(gptq, "TOGETHER_BYTES", together)
    found = METHODS["gptq"].quantize_block(task, SPECS["gptq"]).linears
    assert max(sizes) == (NUMBER if together == 1 << 29 else 5)
    monkeypatch.setattr(gptq, "TOGETHER_BYTES", 0)
    alone = METHODS["gptq"].quantize_block(task, SPECS["gptq"]).linears
    for name, linear in alone.items():
        # An expert's H is the same, and so is its factor; sums of a batched product may be in another order.
        assert (found[name].weight.codes == linear.weight.codes).float().mean() > 0.998


def test_the_sides_of_all_experts_are_seen_in_one_pass_and_what_follows_in_another() -> None:
    task = replace(routed_task(scheme=SCHEME, samples=1), index=3)
    with all_called(task.block):
        groups = input_groups({n: task.linear(n) for n in task.schemes}, next(task.passes(task.inputs)))
    sides, down = seen_together(task.block, groups)
    assert [names[0].split(".")[1] for names in sides] == [str(expert) for expert in range(NUMBER)]
    assert all({name.split(".")[2] for name in names} == {"gate_proj", "up_proj"} for names in sides)
    assert down == [(f"experts.{expert}.down_proj",) for expert in range(NUMBER)]
