"""Durable progress towards a goal: scores and measurements, under the fingerprint of the job.

    state/goal.json        {"fingerprint", "errors": by linear and candidate, "rounded", "made": KL by point}
    state/point-<index>/   finished blocks of a point that was made

A resumed attempt scores and measures nothing again, and goes on with the point in hand.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.disk.durable import replace_file
from workers.engine.job import Job

FILE = "goal.json"


class Progress(BaseModel):
    """Facts that were measured.

    errors    of every linear's candidates, by full name
    rounded   KL of points rounded to nearest, by index
    made      KL of what the method made, by index, in the order of time
    seconds   spent on all of it
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    errors: dict[str, tuple[float, ...]]
    rounded: dict[int, float] = {}
    made: dict[int, float] = {}
    seconds: float = 0.0

    @classmethod
    def adopted(cls, job: Job) -> "Progress | None":
        """The progress of an earlier attempt, if every process finds it."""
        found = cls._read(job.state_folder / FILE, job.fingerprint())
        everyone = job.processes.least(int(found is not None))
        return found if everyone else None

    @classmethod
    def _read(cls, file: Path, fingerprint: str) -> "Progress | None":
        try:
            found = cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None
        return found if found.fingerprint == fingerprint else None

    def rounds_before(self, index: int) -> int:
        """The number of points that were made before this one."""
        made = list(self.made)
        return made.index(index) if index in self.made else len(made)

    def save(self, job: Job) -> "Progress":
        """Returns itself when a crash can no longer lose it."""
        if job.processes.leads:
            job.state_folder.mkdir(parents=True, exist_ok=True)
            replace_file(job.state_folder / FILE, self.model_dump_json().encode())
        return self


def point_folder(job: Job, index: int) -> Path:
    """The folder of the finished blocks of a point."""
    return job.state_folder / f"point-{index:02d}"


def forget_others(job: Job, kept: Collection[int]) -> None:
    """Removes the finished blocks of points that will not be the result."""
    job.processes.wait()
    if job.processes.leads:
        for folder in job.state_folder.glob("point-*"):
            if folder.name not in {point_folder(job, index).name for index in kept}:
                shutil.rmtree(folder, ignore_errors=True)
