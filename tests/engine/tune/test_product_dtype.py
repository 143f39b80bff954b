"""A 16-bit block is tuned in the dtype that the processor multiplies quicker, on the same weights and texts."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme, SignRoundSpec
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.tuning import TuningSettings
from workers.engine.model.block_calls import BlockCall
from workers.engine.tune import tuned_block, tuner
from workers.engine.tune.sequence_order import minibatches, split
from workers.methods.sign_round import SignRound

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)
ONE_STEP = TuningSettings(1, 8, 0.1)


@pytest.fixture
def multiplied_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> torch.dtype:
    for module in (tuner, tuned_block):
        monkeypatch.setattr(module, "product_dtype", lambda *_: request.param)
    dtype: torch.dtype = request.param
    return dtype


@dataclass
class Watched:
    """Weights of one linear that do not move; what the loop gives them is kept."""

    value: Tensor
    name: str = "up"
    gradients: list[Tensor] = field(default_factory=list)
    written: list[torch.dtype] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {self.name: (self.value.shape[0], self.value.shape[1])}

    def write(self, out: Tensor) -> None:
        self.written.append(out.dtype)
        out.copy_(self.value.flatten())

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        self.gradients.append(gradient.clone())
        self.write(out)

    def keep(self, better: Tensor) -> None: ...

    def restart(self) -> None: ...

    def faults(self) -> int:
        return 0

    def adopt(self, other: "Watched") -> None: ...

    def results(self) -> dict[str, Any]:
        return {}


def half_task() -> BlockTask:
    task = toy_task({"up": SCHEME})
    task.block.to(torch.bfloat16)
    states = {name: getattr(task, name).bfloat16() for name in ("inputs", "inputs_fp", "targets")}
    return replace(task, **states)


@pytest.mark.parametrize("multiplied_in", [torch.float32, torch.bfloat16], indirect=True)
def test_the_gradient_is_that_of_the_rounded_weights(multiplied_in: torch.dtype) -> None:
    """Against autograd in fp64 on the same bf16 numbers: what the products are made in decides how close it comes."""
    task = half_task()
    weights = Watched(task.linear("up").weight.detach() * 0.9)
    task.tune(task, [weights], ONE_STEP)
    training, _ = split(len(task.inputs), task.seed)
    batch = minibatches(training, ONE_STEP, task.seed)[0]
    block = toy_task({}).block.bfloat16().double()
    parameter = weights.value.bfloat16().double().requires_grad_()
    output = torch.func.functional_call(block, {"up.weight": parameter}, task.inputs[batch].double())
    (output - task.targets[batch].double()).square().mean().backward()
    (found,) = weights.gradients
    assert parameter.grad is not None
    assert found.dtype == multiplied_in
    assert set(weights.written) == {torch.bfloat16}, "methods write what ships"
    off = (found.double().view_as(parameter) - parameter.grad).norm() / parameter.grad.norm()
    assert off < (1e-5 if multiplied_in == torch.float32 else 2e-2)


@pytest.mark.parametrize("multiplied_in", [torch.float32], indirect=True)
def test_arguments_of_the_call_have_the_dtype_of_its_hidden_states(multiplied_in: torch.dtype) -> None:
    """Attention refuses a mask of another dtype than its queries'."""
    seen: list[Any] = []

    class Taking(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor, mask: Tensor, pair: tuple[Tensor, Tensor], number: int) -> Tensor:
            seen.append((hidden.dtype, mask.dtype, [each.dtype for each in pair], number))
            output: Tensor = self.inner(hidden + mask)
            return output

    task = half_task()
    half, whole = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    call = BlockCall((half,), {"pair": (half, whole), "number": 3})
    task = replace(task, block=Taking(task.block), forward=call, schemes={"inner.up": SCHEME})
    task.tune(task, [Watched(task.linear("inner.up").weight.detach(), "inner.up")], ONE_STEP)
    assert seen
    assert all(each == (multiplied_in, multiplied_in, [multiplied_in, torch.int64], 3) for each in seen)


def test_fp32_products_come_as_close_as_those_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        for module in (tuner, tuned_block):
            monkeypatch.setattr(module, "product_dtype", lambda *_, dtype=dtype: dtype)
        task = replace(half_task(), schemes={"up": SCHEME, "down": SCHEME})
        result = SignRound().quantize_block(task, SignRoundSpec(steps=60, batch_size=8))
        assert result.loss is not None
        assert result.loss_initial is not None
        losses[dtype] = float(result.loss)
        assert float(result.loss) < 0.8 * float(result.loss_initial)
    assert losses[torch.float32] < 1.05 * losses[torch.bfloat16]
