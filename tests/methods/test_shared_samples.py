"""Methods that observe inputs, when several processes share the samples: each sees its own and makes the same codes."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import AWQSpec, GPTQSpec, Scheme
from tests.methods.toy_block import gated_task
from workers.methods.awq import AWQ
from workers.methods.gptq import GPTQ
from workers.numerics.quantized import BlockResult

W3 = Scheme(bits=3, group_size=16, symmetric=False)
PROCESSES = 2


class Exchange:
    """Sums between threads that stand for processes."""

    def __init__(self) -> None:
        self._barrier = Barrier(PROCESSES, timeout=60)
        self._given: dict[int, tuple[Tensor, ...]] = {}

    def sum_(self, number: int, *tensors: Tensor) -> None:
        self._given[number] = tuple(tensor.clone() for tensor in tensors)
        self._barrier.wait()
        sums = [sum(parts[1:], parts[0]) for parts in zip(*(self._given[n] for n in range(PROCESSES)), strict=True)]
        self._barrier.wait()
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total)


@pytest.mark.parametrize(
    ("method", "spec"), [(GPTQ(), GPTQSpec()), (AWQ(), AWQSpec()), (AWQ(), AWQSpec(quantized_inputs=True))], ids=str
)
def test_every_process_makes_the_codes_of_all_samples(method: Any, spec: Any) -> None:
    whole = gated_task({"gate": W3, "up": W3, "down": W3})
    exchange = Exchange()

    def quantize(number: int) -> BlockResult:
        inputs = whole.inputs[number::PROCESSES]
        share: dict[str, Any] = {"inputs": inputs, "inputs_fp": inputs, "targets": whole.targets[number::PROCESSES]}
        task = replace(
            whole, block=copy.deepcopy(whole.block), sum_=lambda *tensors: exchange.sum_(number, *tensors), **share
        )
        result: BlockResult = method.quantize_block(task, spec)
        return result

    with ThreadPoolExecutor(PROCESSES) as pool:
        first, second = pool.map(quantize, range(PROCESSES))
    alone = method.quantize_block(whole, spec).linears
    few = replace(whole, inputs=whole.inputs[:4], inputs_fp=whole.inputs[:4])
    unshared = method.quantize_block(few, spec).linears
    differ = {name: (one.weight.codes != alone[name].weight.codes).float().mean() for name, one in unshared.items()}
    assert max(differ.values()) > 0.01, "samples matter"
    for name, linear in first.linears.items():
        assert torch.equal(linear.weight.codes, second.linears[name].weight.codes)
        assert (linear.weight.codes == alone[name].weight.codes).float().mean() > 0.99
