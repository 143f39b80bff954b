"""A real job on the real engine, small enough to be killed again and again."""

import os
import signal
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from random import Random

from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS
from app.store.models import Job
from bitwright.events import BlockEvent, ProgressEvent
from bitwright.job_states import JobStatus
from tests.e2e.installation import Installation
from tests.supervise.bench import wait_for
from workers.disk.orders import AttemptOrder

TEXT = {"num_samples": 8, "sequence_length": 64}


def submit(installed: Installation, model: Path, *, steps: int) -> str:
    """Queue a SignRound job of `steps` steps per block; its id."""
    return installed.submit(
        model=str(model),
        method="signround",
        group_size=32,
        steps=steps,
        formats=[],
        calibration=TEXT,
        evaluation={**TEXT, "num_samples": 2},
    )


def tensor_hashes(installed: Installation, job_id: str) -> dict[str, str]:
    """sha256 of every file of tensors that the job stored, by format and path."""
    artifacts = installed.client.artifacts(job_id)
    found = {f"{a.format}/{a.path}": a.sha256 for a in artifacts if Path(a.path).suffix == ".safetensors"}
    assert found
    return found


def order_of(installed: Installation, job_id: str) -> AttemptOrder:
    """The order of the job's running attempt."""
    return AttemptOrder.model_validate_json((installed.workspace(job_id) / "order.json").read_bytes())


def run_undisturbed(order: AttemptOrder, folder: Path) -> dict[str, str]:
    """The same order carried out in this process, as `tensor_hashes` tells it."""
    from workers.engine.reporter import Reporter
    from workers.engine.run import run

    # The limited child of the attempt is no child of this process, whose own files have its numbers.
    run(order.model_copy(update={"warm": None}), folder, Reporter(lambda _: None))
    output = folder / "output"
    files = output.rglob("*.safetensors")
    return {file.relative_to(output).as_posix(): sha256(file.read_bytes()).hexdigest() for file in files}


def blocks_computed(installed: Installation, job_id: str) -> list[int]:
    """Indices of the blocks that any attempt has quantized, in order; a block that was adopted is not among them."""
    return [event.index for event in installed.events(job_id) if isinstance(event, BlockEvent)]


def wait_until_quantizing(installed: Installation, job_id: str, attempt: int, *, blocks_done: int) -> None:
    """Wait until this attempt tells that it works on a block, with so many behind it."""

    def quantizing() -> bool:
        job = installed.job(job_id)
        assert job.status is not JobStatus.SUCCEEDED, "the job was too quick to be killed"
        told = [e for n, e in installed.numbered_events(job_id) if n == attempt and isinstance(e, ProgressEvent)]
        return any(event.stage == "quantize" and event.done >= blocks_done for event in told)

    wait_for(quantizing, 120, what=f"attempt {attempt} at its blocks")


class Chaos:
    """Kills parts of an installation at moments that a seed decides, and starts them again."""

    def __init__(self, installed: Installation, job_id: str, seed: int, longest_pause: float) -> None:
        self._installed = installed
        self._job_id = job_id
        self._random = Random(seed)
        self._longest_pause = longest_pause
        self.kills: list[str] = []

    def strike(self) -> None:
        """Kill one part at a random moment while the job is not finished."""
        part = self._random.choice(("attempt", "worker0", "api", "valkey"))
        if part in ("attempt", "worker0"):
            self._strike_attempt(part)
        else:
            self._pause()
            self._installed[part].kill()
            self._installed[part].start()
        self.kills.append(part)

    def _strike_attempt(self, part: str) -> None:
        """Kill a process of an attempt, or its worker, while the attempt runs.

        Three fruitless attempts in a row are borne; a fourth fails the job, rightly, so that one is let be.
        """
        while True:
            wait_for(self._bearable, 300, what="an attempt that may be killed")
            pids = self._installed.attempt_pids()
            self._pause()
            if pids and pids == self._installed.attempt_pids() and self._bearable():
                break
        if part == "attempt":
            with suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
        else:
            self._installed[part].kill()
            self._installed[part].start()

    def _bearable(self) -> bool:
        return bool(self._installed.attempt_pids()) and self._job().fruitless_attempts <= MAX_RETRIES_WITHOUT_PROGRESS

    def _pause(self) -> None:
        time.sleep(self._random.uniform(0, self._longest_pause))
        assert self._job().finished_at is None, f"the job was finished after {self.kills}"

    def _job(self) -> Job:
        return self._installed.job(self._job_id)
