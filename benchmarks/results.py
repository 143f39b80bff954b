"""The table of results, cell by cell: each is one job, one JSON line, and is skipped where that line is there.

    python -m benchmarks.results MODEL --calibration calibration.jsonl --valid valid.jsonl --seconds 540

Cells are those of `benchmarks.cells`; `--only` picks rows by name. A run begins no cell after `--seconds`, so that it
fits into a limit, and the next run goes on. `make docs` makes the table in docs/results.md from the file.

seconds   of the job, less loading, evaluation and export
peak_gib  of the GPU where there is one, else of the process
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from app.domain.events import AttemptOrder
from app.domain.jobs import JobRequest
from app.domain.report import Report
from benchmarks.cells import Cell, cells
from benchmarks.results_table import FILE, lines
from workers.engine.pipeline import run
from workers.engine.reporter import Reporter

OUTSIDE = {"load", "evaluate", "export", "total"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--only", nargs="+", help="rows to measure, by name; else all")
    parser.add_argument("--bits", nargs="+", type=float, help="columns to measure; else all")
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell later than this")
    parser.add_argument("--output", type=Path, default=FILE)
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    left = list(missing(given.output, _chosen(given)))
    for number, cell in enumerate(left):
        if time.monotonic() > until:
            print(f"{len(left) - number} cells are left; run this again", flush=True)
            break
        line = measured(cell, given)
        with given.output.open("a") as output:
            output.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def _chosen(given: argparse.Namespace) -> Iterable[Cell]:
    for cell in cells():
        if (given.only is None or cell.arm in given.only) and (given.bits is None or cell.bits in given.bits):
            yield cell


def missing(file: Path, wanted: Iterable[Cell]) -> Iterable[Cell]:
    """Those without a line in the file."""
    found = {line["key"] for line in lines(file)}
    return (cell for cell in wanted if cell.key not in found)


def measured(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """The line of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        report = run(order(cell, given), Path(folder), Reporter(lambda _: None)).report
    return {"key": cell.key, "arm": cell.arm, "bits": cell.bits, "seed": cell.seed} | _figures(report)


def _figures(report: Report) -> dict[str, Any]:
    assert report.quality is not None
    memory = report.peak_memory
    return {
        "perplexity": round(report.quality.perplexity, 4),
        "perplexity_original": round(report.quality.perplexity_original, 4),
        "kl": round(report.quality.kl_divergence, 5),
        "bits_per_weight": round(report.size.bits_per_weight, 4),
        "seconds": round(sum(s for stage, s in report.seconds.items() if stage not in OUTSIDE), 2),
        "peak_gib": round((memory.device_bytes or memory.host_bytes) / 2**30, 2),
        "device": report.device if report.device == "cpu" else torch.cuda.get_device_name(),
        "calibration": None if report.calibration is None else report.calibration.sha256[:12],
        "tokens": None if report.calibration is None else report.calibration.tokens,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def order(cell: Cell, given: argparse.Namespace) -> AttemptOrder:
    model, calibration, valid = (str(Path(p).resolve()) for p in (given.model, given.calibration, given.valid))
    from_file = cell.text == "file"
    dataset = {"source": "local", "path": calibration} if from_file else {"source": cell.text}
    body = {
        "model": model,
        "quantization": dict(cell.quantization),
        "calibration": {"dataset": dataset},
        "evaluation": {
            "dataset": {"source": "local", "path": valid},
            "num_samples": 32,
            "sequence_length": 1024,
        },
        "formats": ["native"],
        "seed": cell.seed,
    }
    return AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=calibration if from_file else None,
        evaluation_path=valid,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


if __name__ == "__main__":
    main()
