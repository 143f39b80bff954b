"""The scratch folder of a job on a worker's machine. It outlives an attempt, so that the next one can resume.

order.json        what the attempt is to do          output/<format>/  the checkpoints it writes
fetch.json        what the fetch is to do            state/            finished blocks, to resume from
fetched.json      the commit that the job is pinned to
sources/          uploads, datasets, base jobs attempt.log       what the processes say, JSON lines
lock              held by the attempt                used              touched at every use; for retention
rendezvous-N      where the ranks of attempt N meet
empty/            where the fetch works
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from workers.disk.durable import replace_file


@dataclass(frozen=True)
class Workspace:
    """Paths inside a job's folder."""

    folder: Path

    @classmethod
    def of(cls, root: Path, job_id: str) -> "Workspace":
        """The job's folder under `root`, which need not be there."""
        return cls(root / job_id)

    def open(self) -> None:
        """Make the folder if it is not there, and note that it is used."""
        self.sources.mkdir(parents=True, exist_ok=True)
        (self.folder / "used").touch()

    @property
    def order(self) -> Path:
        return self.folder / "order.json"

    @property
    def fetch_order(self) -> Path:
        return self.folder / "fetch.json"

    @property
    def fetched(self) -> Path:
        return self.folder / "fetched.json"

    @property
    def sources(self) -> Path:
        return self.folder / "sources"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        return self.folder / "attempt.log"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    def rendezvous(self, attempt: int) -> Path:
        """The file by which the ranks of an attempt find each other; those of earlier attempts are removed."""
        for old in self.folder.glob("rendezvous-*"):
            old.unlink(missing_ok=True)
        return self.folder / f"rendezvous-{attempt}"

    def write(self, path: Path, message: BaseModel) -> None:
        """Put a message into a file, whole or not at all."""
        replace_file(path, message.model_dump_json(indent=1).encode())

    def remove(self) -> None:
        """Delete the folder; what is not there is no error."""
        shutil.rmtree(self.folder, ignore_errors=True)


def output_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every regular file under a checkpoint's folder with its posix path in it, sorted. Links are no output."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path, path.relative_to(folder).as_posix()


def prune(root: Path, *, unused_seconds: float, in_use: Callable[[str], bool]) -> list[str]:
    """Delete the folders of jobs that were not touched for `unused_seconds` and that `in_use` denies; their ids."""
    pruned = []
    for folder in root.iterdir() if root.is_dir() else ():
        used = folder / "used"
        age = time.time() - (used if used.exists() else folder).stat().st_mtime
        if folder.name.startswith("job_") and age > unused_seconds and not in_use(folder.name):
            Workspace(folder).remove()
            pruned.append(folder.name)
    return pruned
