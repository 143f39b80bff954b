"""Capacity: the workers that could hold a job, number by number."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.api.submission.capacity import capacity_warnings, require_capacity
from app.domain.capacity import GIB, MARGIN
from app.store.models import Worker
from bitwright.errors import ExceedsCapacity
from tests.store.samples import request

HOST, DEVICE, DISK, TOTAL = "host_memory_bytes", "device_memory_bytes", "disk_bytes", "disk_total_bytes"


def worker(capacity: dict[str, Any] | None = None, device_class: str = "cuda") -> Worker:
    return cast(Worker, SimpleNamespace(device_class=device_class, capacity=capacity or {}))


def refused(estimates: dict[str, Any], *workers: Worker, device: str = "any") -> bool:
    try:
        require_capacity(request(device=device), estimates, workers)
    except ExceedsCapacity:
        return True
    return False


def test_the_margin_is_two() -> None:
    assert (MARGIN, GIB) == (2.0, 1_073_741_824)


@pytest.mark.parametrize(
    ("needed", "have", "is_refused"),
    [
        ({HOST: 20}, {HOST: 10}, False),
        ({HOST: 21}, {HOST: 10}, True),
        ({HOST: 40}, {HOST: 10, DEVICE: 10}, False),  # activations lie in either
        ({HOST: 41}, {HOST: 10, DEVICE: 10}, True),
        ({DEVICE: 21}, {HOST: 100, DEVICE: 10}, True),
        ({DEVICE: 21}, {HOST: 100}, False),  # it does not tell
        ({DISK: 21}, {DISK: 10, TOTAL: 100}, False),  # what is free changes
        ({DISK: 21}, {DISK: 100, TOTAL: 10}, True),
        ({HOST: None}, {HOST: 1}, False),
        ({}, {HOST: 1}, False),
    ],
)
def test_a_job_is_refused_beyond_twice_of_what_there_is(
    needed: dict[str, Any], have: dict[str, int], is_refused: bool
) -> None:
    assert refused(needed, worker(have)) is is_refused


def test_every_worker_of_its_class_must_be_too_small() -> None:
    small, large = {HOST: 1}, {HOST: 100}
    assert refused({HOST: 50}) is False, "nobody is alive"
    assert refused({HOST: 50}, worker(small), worker(small)) is True
    assert refused({HOST: 50}, worker(small), worker(large)) is False
    assert refused({HOST: 50}, worker(small, "cpu"), worker(large, "cuda"), device="cpu") is True
    assert refused({HOST: 50}, worker(small, "cuda"), device="cpu") is False


def test_a_dry_run_warns_from_the_first_byte_on() -> None:
    def warned(needed: dict[str, Any], *workers: Worker, device: str = "any") -> list[str]:
        return capacity_warnings(request(device=device), needed, workers)

    gib = 1 << 30
    assert warned({}) == ["no worker is alive now; the job will wait for one"]
    assert warned({}, worker(None, "cpu"), device="cuda") == ["no cuda worker is alive now; the job will wait for one"]
    assert warned({DISK: 3 * gib}, worker({DISK: 3 * gib})) == []
    assert warned({DISK: 3 * gib + 1}, worker({DISK: gib}), worker({DISK: 3 * gib})) == [
        "the job needs about 3.0 GiB of free disk; the largest worker has 3.0 GiB"
    ]
    assert warned({DISK: 4 * gib}, worker({DISK: gib}), worker()) == [], "one does not tell"
    assert warned({HOST: 2 * gib, DEVICE: 4 * gib}, worker({HOST: gib, DEVICE: gib})) == [
        "the job needs about 2.0 GiB of memory; the largest worker has 1.0 GiB",
        "the job needs about 4.0 GiB of GPU memory; the largest worker has 1.0 GiB",
    ]


@pytest.mark.parametrize(
    ("workers", "is_refused"),
    [
        ([], False),
        ([{"runtimes": {"transformers": "5.23.0"}}], True),
        ([{"runtimes": {"transformers": "5.23.0"}}, {"runtimes": {"vllm": "0.32.0"}}], False),
        ([{"runtimes": {"transformers": "5.23.0"}}, {}], False),  # an older one, of which nothing is known
        ([{}], False),
    ],
)
def test_a_runtime_that_no_worker_has_is_refused(workers: list[dict[str, Any]], is_refused: bool) -> None:
    asked = request(require={"loads": ["vllm"]})
    alive = [worker(capacity) for capacity in workers]
    caught = None
    try:
        require_capacity(asked, {}, alive)
    except ExceedsCapacity as error:
        caught = error
    assert (caught is not None) is is_refused
    assert caught is None or (caught.field, caught.value) == ("require.loads", "vllm")
    warned = any("vllm" in warning for warning in capacity_warnings(asked, {}, alive))
    assert warned is bool(workers), "it is so unless each of them has it"


def test_a_runtime_that_all_workers_have_is_no_matter() -> None:
    asked = request(require={"loads": ["vllm"]})
    assert capacity_warnings(asked, {}, [worker({"runtimes": {"vllm": "0.32.0"}})]) == []
