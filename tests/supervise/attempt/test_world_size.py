"""A job on several ranks, from the supervisor down: how many there are, and that one's end is the end of all."""

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from app.domain.request.job_request import JobRequest
from app.settings import Settings
from bitwright.events import BlockEvent
from bitwright.job_states import DeviceClass, JobStatus
from tests.supervise.bench import Bench, Running, alive, wait_for
from workers.disk.workspace import Workspace
from workers.supervise import capacity as capacity_module
from workers.supervise.attempt.world_size import world_size
from workers.supervise.child_env import attempt_environment

TEXTS = {
    "calibration": {"num_samples": 8, "sequence_length": 32},
    "evaluation": {"num_samples": 2, "sequence_length": 32},
}


@pytest.mark.parametrize(
    ("method", "num_samples", "devices", "expected"),
    [
        ({"method": "signround", "batch_size": 8}, 128, 1, 1),
        ({"method": "signround", "batch_size": 8}, 128, 2, 2),
        ({"method": "signround", "batch_size": 8}, 128, 7, 4),  # the most that divide the batch
        ({"method": "signround", "batch_size": 6}, 128, 4, 3),
        ({"method": "signround", "batch_size": 7}, 128, 4, 1),
        ({"method": "signround", "batch_size": 8}, 7, 8, 2),  # two sequences for each
        ({"method": "signround", "batch_size": 8}, 3, 8, 1),
        ({"method": "signround", "batch_size": 8, "steps": 0}, 128, 8, 1),
        ({"method": "rtn"}, 128, 8, 1),
    ],
)
def test_a_job_gets_the_ranks_that_divide_its_batch(
    method: dict[str, object], num_samples: int, devices: int, expected: int
) -> None:
    body = {"model": "/m", "quantization": method, "calibration": {"num_samples": num_samples, "sequence_length": 32}}
    assert world_size(JobRequest.parse(body), devices) == expected


@pytest.mark.parametrize(
    ("body", "devices", "expected"),
    [
        ({"method": "qlora"}, 4, 4),
        ({"method": "qa-lora"}, 16, 8),  # not more than sequences per step
        ({"method": "qlora"}, 3, 3),  # evenly or not
        ({"method": "loftq", "rank": 8}, 2, 2),
        (
            {"method": "lq-lora", "bits": {"average": 3}, "calibration": {"num_samples": 5}},
            4,
            2,
        ),  # two sequences for each
        ({"quantization": {"method": "signround", "batch_size": 6}}, 4, 3),
        ({"quantization": {"method": "signround", "batch_size": 6}, "base_job": "job_1"}, 4, 4),  # nothing is tuned
    ],
)
def test_finetuning_takes_the_ranks_that_the_method_leaves_open(
    body: dict[str, object], devices: int, expected: int
) -> None:
    request = JobRequest.parse({"model": "/m", "finetune": {"dataset": {"source": "builtin"}}} | body)
    assert world_size(request, devices) == expected


def test_a_worker_counts_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_module, "may_have_gpu", lambda: True)
    monkeypatch.setattr(capacity_module, "_probe", lambda: {"name": "A GPU", "memory": 1 << 30, "count": 4})
    monkeypatch.setattr(capacity_module, "_triton_fault", lambda: None)
    found = {wanted: capacity_module.capacity("cuda", tmp_path, wanted).devices for wanted in (1, 3, "all")}
    assert found == {1: 1, 3: 3, "all": 4}
    with pytest.raises(RuntimeError, match="BITWRIGHT_DEVICES is 5, but torch finds 4"):
        capacity_module.capacity("cuda", tmp_path, 5)
    on_cpu = [capacity_module.capacity("cpu", tmp_path, wanted) for wanted in ("all", 2)]
    assert [(c.device, c.devices) for c in on_cpu] == [(DeviceClass.CPU, 1), (DeviceClass.CPU, 2)]


def test_a_worker_says_what_keeps_triton_from_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_module, "may_have_gpu", lambda: True)
    monkeypatch.setattr(capacity_module, "_probe", lambda: {"name": "A GPU", "memory": 1 << 30, "count": 1})
    for fault, kernels in ((None, "triton"), ("RuntimeError: Failed to find C compiler.", "torch")):
        monkeypatch.setattr(capacity_module, "_triton_fault", lambda fault=fault: fault)
        found = capacity_module.capacity("cuda", tmp_path)
        assert (found.kernels, found.kernels_fault) == (kernels, fault)
    on_cpu = capacity_module.capacity("cpu", tmp_path)
    assert (on_cpu.kernels, on_cpu.kernels_fault) == ("torch", None)


def test_the_setting_is_a_number_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().devices == 1
    for text, value in (("all", "all"), ("3", 3)):
        monkeypatch.setenv("BITWRIGHT_DEVICES", text)
        assert Settings().devices == value
    for text in ("0", "many"):
        monkeypatch.setenv("BITWRIGHT_DEVICES", text)
        with pytest.raises(ValueError, match="devices"):
            Settings()


def test_what_an_operator_says_to_nccl_reaches_the_ranks(sqlite_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite_bench.submit("")
    claim = sqlite_bench.claim()
    workspace = Workspace.of(sqlite_bench.context.settings.workspace_dir, claim.job_id)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    told = attempt_environment(sqlite_bench.context.settings, DeviceClass.CPU, workspace, claim, 2)
    assert (told["NCCL_SOCKET_IFNAME"], told["GLOO_SOCKET_IFNAME"], told["NCCL_NVLS_ENABLE"]) == ("lo", "lo", "0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    told = attempt_environment(sqlite_bench.context.settings, DeviceClass.CPU, workspace, claim, 2)
    assert (told["NCCL_SOCKET_IFNAME"], told["NCCL_DEBUG"]) == ("eth7", "INFO")


@pytest.fixture
def two_ranks(sqlite_bench: Bench) -> Bench:
    """A worker that gives two processes to a real attempt at a small real model."""
    from workers.tiny_model import Recipe, make_tiny_model

    recipe = Recipe(vocabulary=300, width=32, intermediate=64, blocks=3, positions=64, steps=5, batch=2, length=32)
    model = make_tiny_model(sqlite_bench.model.parent / "tiny", recipe)
    capacity = replace(sqlite_bench.context.capacity, devices=2)
    context = replace(sqlite_bench.context, capacity=capacity, attempt_module="workers.child.attempt")
    return replace(sqlite_bench, context=context, model=model)


def submit(bench: Bench, **method: object) -> str:
    quantization = {"method": "signround", "bits": 4, "group_size": 32, "batch_size": 4, **method}
    body = {"model": str(bench.model), "quantization": quantization, **TEXTS}
    return bench.submit_body(body)


def processes_of(folder: Path) -> dict[int, bytes]:
    """The living processes of an attempt in this workspace, and how each was started."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found[int(file.parent.name)] = file.read_bytes()
    return {pid: line for pid, line in found.items() if str(folder).encode() in line and alive(pid)}


def rank_pids(folder: Path) -> list[int]:
    """The ranks of the attempt in this workspace, in order; each leads its process group."""
    found = processes_of(folder)
    return sorted((pid for pid in found if os.getpgid(pid) == pid), key=lambda pid: found[pid])


def wait_for_block(bench: Bench, running: Running) -> None:
    def finished() -> bool:
        return any(isinstance(event, BlockEvent) for event in bench.events(running.claim.job_id))

    wait_for(finished, 150, what="the first block")


@pytest.mark.slow
def test_the_end_of_one_rank_is_the_attempts_and_the_next_goes_on(two_ranks: Bench) -> None:
    job_id = submit(two_ranks, steps=80)
    running = two_ranks.start()
    wait_for_block(two_ranks, running)
    pids = rank_pids(two_ranks.workspace(job_id))
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert running.wait() is JobStatus.QUEUED
    assert not processes_of(two_ranks.workspace(job_id))
    error = two_ranks.attempts(job_id)[0].error
    assert error is not None
    assert error["code"] == "attempt_killed"
    again = two_ranks.start()
    assert again.wait(150) is JobStatus.SUCCEEDED
    report = two_ranks.job(job_id).report
    assert report is not None
    assert report["plan"]["world_size"] == 2
    assert report["blocks_resumed"] >= 1
    assert sorted(e.index for e in two_ranks.events(job_id) if isinstance(e, BlockEvent)) == [0, 1, 2]


@pytest.fixture
def scripted_ranks(sqlite_bench: Bench) -> Bench:
    """A worker that gives three processes to an attempt that follows a script."""
    capacity = replace(sqlite_bench.context.capacity, devices=3)
    return replace(sqlite_bench, context=replace(sqlite_bench.context, capacity=capacity))


def submit_script(bench: Bench, script: str) -> str:
    """A job that three ranks divide."""
    return bench.submit(script, method="signround", batch_size=3)


def pids_of(running: Running) -> list[int]:
    """The ranks' process ids, which a script with `pid` in it reports."""
    found = [running.log_event(f"rank_{rank}")["pid"] for rank in range(3)]
    return [pid for pid in found if isinstance(pid, int)]


TELL = "pid,rank:1:pid,rank:2:pid,"


def test_a_cancel_ends_all_ranks_within_five_seconds(scripted_ranks: Bench) -> None:
    job_id = submit_script(scripted_ranks, TELL + "hang,rank:1:hang,rank:2:hang")
    running = scripted_ranks.start()
    pids = pids_of(running)
    assert all(map(alive, pids))
    scripted_ranks.cancel(job_id)
    assert running.wait(5) is JobStatus.CANCELLED
    assert len(set(pids)) == 3
    assert not processes_of(scripted_ranks.workspace(job_id))


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("rank:1:fail:group_size_does_not_divide,lost:1,rank:2:lost:1", "group_size_does_not_divide"),
        ("rank:2:raise:MemoryError,hang,rank:1:hang", "out_of_memory"),
        ("rank:1:signal:SIGKILL,lost:1,rank:2:lost:1", "attempt_killed"),
        ("rank:2:exit:7,hang", "internal_error"),
        ("signal:SIGSEGV,rank:1:lost:0,rank:2:lost:0", "attempt_killed"),
        ("fail:corrupt_checkpoint,rank:1:hang,rank:2:hang", "corrupt_checkpoint"),
    ],
)
def test_the_rank_that_failed_first_decides_the_code(script: str, code: str, scripted_ranks: Bench) -> None:
    job_id = submit_script(scripted_ranks, TELL + script)
    scripted_ranks.run()
    assert not processes_of(scripted_ranks.workspace(job_id))
    error = scripted_ranks.attempts(job_id)[0].error
    assert error is not None
    assert error["code"] == code


def test_ranks_that_are_done_wait_for_nobody(scripted_ranks: Bench) -> None:
    """The first rank has work left when the others end."""
    submit_script(scripted_ranks, TELL + "sleep:1,file:a.json:{}")
    assert scripted_ranks.run() is JobStatus.SUCCEEDED


def test_a_method_that_shares_nothing_has_one_process(scripted_ranks: Bench) -> None:
    scripted_ranks.submit("pid,rank:1:pid,file:a.json:{}")
    running = scripted_ranks.start()
    running.log_event("rank_0")
    assert running.wait() is JobStatus.SUCCEEDED
    events = scripted_ranks.events(running.claim.job_id)
    assert [event.event for event in events if event.type == "log"] == ["rank_0"]


@pytest.mark.parametrize(
    ("build", "driver", "expected"),
    [
        ("2.13.0+cpu", True, False),
        ("2.13.0", True, True),
        ("2.13.0+cu130", False, False),
        ("2.13.0+rocm7.0", False, True),
        ("2.13.0", False, False),
    ],
)
def test_torch_is_asked_for_gpus_only_where_there_can_be_one(
    monkeypatch: pytest.MonkeyPatch, build: str, driver: bool, expected: bool
) -> None:
    monkeypatch.setattr(capacity_module, "version", lambda _: build)
    monkeypatch.setattr(capacity_module, "DRIVER", "libc.so.6" if driver else "libno-such-driver.so.1")
    monkeypatch.setattr("sys.platform", "linux")
    assert capacity_module.may_have_gpu() is expected
