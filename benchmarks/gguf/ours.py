"""One job of the service, to its GGUF file: the pipeline that a worker runs, without its evaluation."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run

APART = {"load", "evaluate", "export", "total"}
"""Stages that no figure counts."""
FILES = {"gguf": "model.gguf", "compressed-tensors": "model.safetensors"}


@dataclass(frozen=True)
class Job:
    """What a request says.

    calibration   the request's `calibration`; None: as it is by default, for jobs that read no text
    """

    model: Path
    quantization: Mapping[str, Any]
    device: str
    calibration: Mapping[str, Any] | None = None
    seed: int = 0
    format: str = "gguf"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A job's file.

    seconds   of its work, without loading and export
    total     with both
    bits      of a weight of its linears, as stored
    text      SHA-256 of the sequences that calibrated it; None: none did
    """

    file: Path
    bytes: int
    seconds: float
    total: float
    bits: float
    text: str | None


def order_of(job: Job) -> AttemptOrder:
    """What a worker's child is told of a job."""
    body: dict[str, Any] = {
        "model": str(job.model),
        "quantization": dict(job.quantization),
        "evaluation": None,
        "formats": [job.format],
        "seed": job.seed,
        "verify": "off",
        **({} if job.calibration is None else {"calibration": dict(job.calibration)}),
        **job.extra,
    }
    return AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(job.model),
        calibration_path=None if job.calibration is None else job.calibration["dataset"]["path"],
        device="cuda" if job.device == "cuda" else "cpu",
    )


def finished(job: Job, folder: Path) -> Finished:
    """Runs a job and moves its file into a folder, where it has the name of none other."""
    with tempfile.TemporaryDirectory(dir=folder) as workspace:
        report = run(order_of(job), Path(workspace), Reporter(lambda _: None)).report
        made = Path(workspace) / "output" / job.format / FILES[job.format]
        file = Path(tempfile.mkdtemp(dir=folder)) / made.name
        shutil.move(made, file)
    seconds = sum(spent for name, spent in report.seconds.items() if name not in APART)
    text = None if report.calibration is None else report.calibration.sha256
    size = file.stat().st_size
    return Finished(file, size, seconds, report.seconds["total"], report.size.bits_per_weight, text)
