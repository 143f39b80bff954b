"""Tests of the memory for stacks that a waiting process gives back."""

import ctypes
from typing import Any

import pytest
import torch

from workers.child.gpu_stacks import LEAST_BYTES, STACK_SIZE, give_stacks_back, loaded_driver

ENOUGH = 100 << 20


class Limits:
    """A driver's limits; it answers `refuses` where a stack is to become so large."""

    def __init__(self, usual: int, refuses: tuple[int, ...] = (), gets: int = 0) -> None:
        self.values, self.refuses, self.gets = {STACK_SIZE: usual, 2: 8 << 20}, refuses, gets

    def cuCtxGetLimit(self, value: Any, limit: int, /) -> int:  # noqa: N802
        value._obj.value = self.values[limit]
        return self.gets

    def cuCtxSetLimit(self, limit: int, value: ctypes.c_size_t, /) -> int:  # noqa: N802
        if value.value in self.refuses:
            return 2
        self.values[limit] = value.value
        return 0


def test_stacks_are_small_until_there_is_a_job() -> None:
    driver = Limits(1024)
    begin = give_stacks_back(driver)
    assert driver.values == {STACK_SIZE: LEAST_BYTES, 2: 8 << 20}
    begin()
    assert driver.values == {STACK_SIZE: 1024, 2: 8 << 20}


@pytest.mark.parametrize("driver", [None, Limits(1024, refuses=(LEAST_BYTES,)), Limits(1024, gets=1)])
def test_what_the_driver_refuses_stays_as_it_is(driver: Limits | None) -> None:
    give_stacks_back(driver)()
    assert driver is None or driver.values[STACK_SIZE] == 1024


def test_a_job_does_not_begin_without_the_usual_stacks() -> None:
    begin = give_stacks_back(Limits(1024, refuses=(1024,)))
    with pytest.raises(RuntimeError, match="stacks of 1024 bytes a thread: error 2"):
        begin()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_memory_meanwhile_and_computes_afterwards() -> None:
    ones = torch.ones(1000, device="cuda")
    before, _ = torch.cuda.mem_get_info()
    begin = give_stacks_back(loaded_driver())
    meanwhile, _ = torch.cuda.mem_get_info()
    begin()
    after, _ = torch.cuda.mem_get_info()
    assert meanwhile - before > ENOUGH
    assert abs(after - before) < ENOUGH
    assert torch.sort(ones.cumsum(0), descending=True).values[0].item() == 1000
