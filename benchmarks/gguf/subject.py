"""A model that both sides quantize, with what its rows share: the original as a file, its logits, and an imatrix."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.against_auto_round import read_text, windows
from benchmarks.gguf.llama_cpp import Judge, Quantize, obeyed
from benchmarks.gguf.originals import Texts, write_importance, write_original
from benchmarks.gguf.ours import Job, finished, order_of
from benchmarks.gguf.rows import Ours, Peer, Row


@dataclass(frozen=True)
class Machine:
    """Where rows are made.

    libraries   folder of llama.cpp's
    pool        processes of jobs, which share the device; so many as `workers`
    judges      files that llama.cpp reads at a time, with so many threads each
    until       no row begins after that time, of the monotonic clock
    """

    device: str
    libraries: Path
    pool: ProcessPoolExecutor
    workers: int
    judges: int
    until: float

    @property
    def threads(self) -> int:
        """Of one judge."""
        return max(1, len(os.sched_getaffinity(0)) // self.judges)


@dataclass(frozen=True)
class Subject:
    """A model with its original file in a folder."""

    model: Path
    folder: Path
    machine: Machine
    texts: Texts
    seed: int

    @property
    def original(self) -> Path:
        """GGUF in fp32."""
        return self.folder / "original.gguf"

    def prepare(self, sequences: int, length: int) -> dict[str, Any]:
        """Makes what rows share; what llama.cpp says of the original.

        sequences, length   of the text that judges: as many as there are, spread over the text
        """
        write_original(self.model, self.original)
        text = self.texts.sequences(self.model, self.seed)
        write_importance(self.model, text.ids, self.machine.device, self.folder / "importance.npz")
        (self.folder / "text").write_text(text.sha256)
        if self.machine.device == "cuda":
            torch.cuda.empty_cache()
        cut = windows(AutoTokenizer.from_pretrained(self.model), read_text(str(self.texts.valid)), length)[:, 0]
        chosen = torch.linspace(0, len(cut) - 1, min(sequences, len(cut))).long()
        np.save(self.folder / "ids.npy", cut[chosen].numpy().astype(np.int32))
        return self._judged(self.original, writes=True) | {"bytes": self.original.stat().st_size}

    def results(self, rows: list[Row]) -> Iterator[dict[str, Any]]:
        """The rows as they become known, llama.cpp's first: sizes of its files are limits of ours."""
        sizes: dict[str, int] = {}
        turns, jobs = threading.Semaphore(self.machine.judges), threading.Semaphore(self.machine.workers)
        for kind in (Peer, Ours):
            some = [row for row in rows if isinstance(row.make, kind)]
            if not some:
                continue
            with ThreadPoolExecutor(len(some)) as threads:
                for done in as_completed([threads.submit(self._result, row, sizes, turns, jobs) for row in some]):
                    yield done.result()

    def _result(
        self, row: Row, sizes: dict[str, int], turns: threading.Semaphore, jobs: threading.Semaphore
    ) -> dict[str, Any]:
        told = {"table": row.table, "subject": row.subject, "name": row.name, "seed": self.seed}
        try:
            if isinstance(row.make, Peer):
                with turns:
                    self._in_time()
                    file, made = self._by_llama_cpp(row.make)
                if row.baseline:
                    sizes[f"{row.table} {row.subject}"] = made["bytes"]
            else:
                with jobs:
                    self._in_time()
                    file, made = self._by_a_job(row.make, sizes.get(f"{row.table} {row.subject}"))
            with turns:
                judged = self._judged(file, writes=False)
            file.unlink()
        except Exception as error:  # one row that fails leaves the others
            return told | {"error": f"{type(error).__name__}: {error}"}
        return told | made | judged

    def _in_time(self) -> None:
        if time.monotonic() > self.machine.until:
            raise TimeoutError("no time was left")

    def _by_llama_cpp(self, make: Peer) -> tuple[Path, dict[str, Any]]:
        started = time.perf_counter()
        target = self.folder / f"peer-{threading.get_ident()}-{time.monotonic_ns()}.gguf"
        order = Quantize(
            str(self.machine.libraries),
            str(self.original),
            str(target),
            make.file_type,
            dict(make.types),
            str(self.folder / "importance.npz") if make.importance else None,
            self.machine.threads,
        )
        return target, obeyed(order) | {"seconds": time.perf_counter() - started}

    def _by_a_job(self, make: Ours, limit: int | None) -> tuple[Path, dict[str, Any]]:
        quantization: Mapping[str, Any] = make.quantization
        if make.at_most:
            if limit is None:
                raise RuntimeError("the baseline's size is not known")
            quantization = {**quantization, "at_most": {"bytes": limit}}
        job = Job(self.model, quantization, self.machine.device, self.texts.fields(), self.seed)
        made = self.machine.pool.submit(finished, job, self.folder).result()
        # A job with a limit holds some of the sequences out, which decide what it chooses.
        if not make.at_most and made.text not in (None, self._text(order_of(job).request.calibration.further_samples)):
            raise RuntimeError("the job was calibrated on other sequences than the imatrix")
        return made.file, {"bytes": made.bytes, "seconds": made.seconds, "bits": made.bits}

    def _text(self, further: int) -> str:
        """SHA-256 of the sequences of a job that asks for so many further ones."""
        if not further:
            return (self.folder / "text").read_text()
        return self.texts.sequences(self.model, self.seed, further).sha256

    def _judged(self, file: Path, *, writes: bool) -> dict[str, Any]:
        names = (str(self.machine.libraries), str(file), str(self.folder / "ids.npy"), str(self.folder / "logits.npy"))
        # The original is read alone.
        threads = self.machine.threads * (self.machine.judges if writes else 1)
        return obeyed(Judge(*names, writes, threads))
