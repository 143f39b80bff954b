"""Checkpoints of training on disk, so that a killed attempt goes on from the last of them as if nothing had happened.

    state/training.json                  {"fingerprint": ..., "progress": {...}, "file": ..., "sha256": ...}
    state/training-0000050.safetensors   parameters, moments, losses so far; after that step

A file is durable before training.json names it, training.json is replaced whole, and the file before it goes last. An
attempt adopts what it finds only under its own fingerprint and if the hash matches. Where text begins is no state: the
order of batches and the random numbers of a step follow from the seed and the step's number. Of several ranks, which
all hold the same parameters, the first writes.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from bitwright.report import Validation
from workers.disk.durable import replace_file
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup


class TrainingProgress(BaseModel):
    """State of training after `step` steps, beside tensors.

    validations   on held-out text, in order
    best_step     the step of the lowest of them
    stale         validations since then
    seconds       spent on steps, and `tokens` read in them, by all attempts
    done          nothing is left to train
    """

    model_config = ConfigDict(frozen=True)

    step: int = 0
    validations: tuple[Validation, ...] = ()
    best_step: int | None = None
    stale: int = 0
    seconds: float = 0.0
    tokens: int = 0
    done: bool = False


class TrainingFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    fingerprint: str
    progress: TrainingProgress
    file: str
    sha256: str


class TrainingState:
    """The checkpoint of a workspace's state folder, held by one attempt; every rank makes one of these at once."""

    def __init__(self, folder: Path, fingerprint: str, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fingerprint = fingerprint
        self._processes = processes
        self._saved = self._adopt()

    @property
    def progress(self) -> TrainingProgress:
        """Of the last checkpoint; at the start of training if there is none."""
        return TrainingProgress() if self._saved is None else self._saved.progress

    def tensors(self) -> dict[str, Tensor]:
        """Those of the last checkpoint, on the host; none if there is no checkpoint."""
        return {} if self._saved is None else load((self._folder / self._saved.file).read_bytes())

    def save(self, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> None:
        """Makes a checkpoint durable and lets the one before it go. Returns when a crash can no longer lose it."""
        if not self._processes.leads:
            return
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        before, file = self._saved, f"training-{progress.step:07d}.safetensors"
        if before is not None and before.file == file:
            file = f"training-{progress.step:07d}-{'done' if progress.done else 'again'}.safetensors"
        replace_file(self._folder / file, data)
        digest = hashlib.sha256(data).hexdigest()
        self._saved = TrainingFile(fingerprint=self._fingerprint, progress=progress, file=file, sha256=digest)
        replace_file(self._folder / "training.json", self._saved.model_dump_json().encode())
        if before is not None and before.file != file:
            with suppress(FileNotFoundError):
                (self._folder / before.file).unlink()

    def _adopt(self) -> TrainingFile | None:
        stored = self._read()
        # None goes on before all have looked, so none sees what another writes; all adopt the same, or nothing.
        step = -1 if stored is None else stored.progress.step
        return stored if self._processes.agree(step) else None

    def _read(self) -> TrainingFile | None:
        try:
            stored = TrainingFile.model_validate_json((self._folder / "training.json").read_bytes())
            if stored.fingerprint != self._fingerprint:
                return None
            data = (self._folder / Path(stored.file).name).read_bytes()
        except (OSError, ValidationError):
            return None
        return stored if hashlib.sha256(data).hexdigest() == stored.sha256 else None
