"""The table of results, cell by cell: each is one job, one JSON line, and is skipped where that line is there.

    python -m benchmarks.tables.results MODEL --calibration calibration.jsonl --valid valid.jsonl --seconds 540

Cells are those of `benchmarks.tables.cells`; `--only` picks rows by name. A run begins no cell after `--seconds`, so
that it fits into a limit, and the next run goes on. `make docs` makes the table in docs/results.md from the file. With
`--processes` several work side by side, on all GPUs in turn, each with its share of the processors: more cells in the
same time, but their seconds are then upper bounds.

With `--training` there are also the cells of `benchmarks.tables.finetuning_cells`; those of one base share its blocks.

seconds      of the job, less loading, evaluation and export; of finetuning alone where there is some
peak_gib     of the GPU where there is one, else of the process
loss         of training: the mean over the last tenth of the steps, nats per token
held_out     the loss on the evaluation text with the trained adapters, nats per token
merged       the same of the merged checkpoint, as it loads
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import JobRequest
from benchmarks.tables.cells import Cell, cells
from benchmarks.tables.finetuning_cells import finetuning_cells
from benchmarks.tables.results_table import FILE, lines
from bitwright.report import Report
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer
from workers.formats.load_bitwright import load

OUTSIDE = {"load", "evaluate", "export", "total"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--training", help="text that adapters learn; without it nothing is finetuned")
    parser.add_argument("--only", nargs="+", help="rows to measure, by name; else all")
    parser.add_argument("--bits", nargs="+", type=float, help="columns to measure; else all")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to measure; else all")
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell later than this")
    parser.add_argument("--processes", type=int, default=1, help="that measure side by side")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=FILE)
    given = parser.parse_args()
    if given.processes > 1:
        sys.exit(side_by_side(given.processes, sys.argv[1:]))
    until = time.monotonic() + given.seconds
    # Shared before the measured ones are left out: other processes add some meanwhile.
    left = list(missing(given.output, share(list(_chosen(given)), *given.share)))
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(left):
            if time.monotonic() > until:
                print(f"{len(left) - number} cells are left; run this again", flush=True)
                break
            line = measured(cell, given, Path(folder))
            with given.output.open("a") as output:
                output.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def side_by_side(count: int, arguments: Sequence[str]) -> int:
    """Runs this program `count` times, each with its share of cells, processors and GPUs; 1 if one of them failed."""
    processors = sorted(os.sched_getaffinity(0))
    each = max(1, len(processors) // count)
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    running, gpus = [], named.split(",")
    for index in range(count):
        # Threads that wait sleep: spinning ones would take the processors of the others.
        own = os.environ | {"OMP_NUM_THREADS": str(each), "OMP_WAIT_POLICY": "PASSIVE"}
        if torch.cuda.is_available():
            own["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        # The last of the options counts.
        one = [*arguments, "--processes", "1", "--share", str(index), str(count)]
        running.append(subprocess.Popen([sys.executable, "-m", "benchmarks.tables.results", *one], env=own))
    ended = [process.wait() for process in running]
    return int(any(ended))


def share(wanted: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """Every `count`-th group of cells from `index` on; those of one base and seed stay together."""
    groups: dict[str, list[Cell]] = {}
    for cell in wanted:
        groups.setdefault(base_of(cell), []).append(cell)
    return [cell for group in list(groups.values())[index::count] for cell in group]


def base_of(cell: Cell) -> str:
    """Key that cells with the same quantized blocks share."""
    return hashlib.sha256(json.dumps([dict(cell.quantization), cell.text, cell.seed]).encode()).hexdigest()[:16]


def _chosen(given: argparse.Namespace) -> Iterable[Cell]:
    trained = () if given.training is None else finetuning_cells()
    for cell in (*cells(), *trained):
        picked = ((given.only, cell.arm), (given.bits, cell.bits), (given.seeds, cell.seed))
        if all(wanted is None or value in wanted for wanted, value in picked):
            yield cell


def missing(file: Path, wanted: Iterable[Cell]) -> Iterable[Cell]:
    """Those without a line in the file."""
    known = {line["key"] for line in lines(file)}
    return (cell for cell in wanted if cell.key not in known)


def measured(cell: Cell, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The line of a cell; jobs with the same base find its blocks in a folder below `folder`."""
    named = {"key": cell.key, "arm": cell.arm, "bits": cell.bits, "seed": cell.seed}
    workspace = folder / base_of(cell)
    workspace.mkdir(exist_ok=True)
    given_order = order(cell, given)
    report = run(given_order, workspace, Reporter(lambda _: None)).report
    line = named | _figures(report)
    if cell.training is None:
        shutil.rmtree(workspace)
        return line
    line |= _training_figures(report) | {"merged": round(_merged_loss(given_order, workspace / "output"), 5)}
    shutil.rmtree(workspace / "output")
    return line


def _training_figures(report: Report) -> dict[str, Any]:
    finetuning, adapter = report.finetuning, report.adapter
    assert finetuning is not None
    assert adapter is not None
    # The adapter beside its base; what a merge makes of it is measured of the files.
    apart = adapter.before_merge or next(way.figures for way in report.shipped if way.adapter is not None)
    last = finetuning.losses[-max(1, len(finetuning.losses) // 10) :]
    peak = finetuning.peak_device_bytes or report.peak_memory.host_bytes
    return {
        "loss": round(fmean(point.loss for point in last), 5),
        "held_out": round(math.log(apart.perplexity), 5),
        "parameters": adapter.parameters,
        "seconds": round(finetuning.seconds, 2),
        "tokens_per_second": round(finetuning.tokens_per_second),
        "peak_gib": round(peak / 2**30, 2),
        "merge_error": None if adapter.merge is None else adapter.merge.error_shipped,
        "bit_operations_saved": None if adapter.bit_operations is None else adapter.bit_operations.adapter_saving,
    }


@torch.no_grad()
def _merged_loss(given: AttemptOrder, output: Path) -> float:
    """The loss of the checkpoint that a job left, on its evaluation text: nats per token."""
    evaluation = given.request.evaluation
    assert evaluation is not None
    folder = output / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto") if folder.exists() else load(output / "native")
    model = model.to(given.device)
    sequences = evaluation_sequences(
        load_tokenizer(Path(given.model_path)),
        evaluation,
        Path(str(given.evaluation_path)),
        given.request.seed,
        *(None if path is None else Path(path) for path in (given.calibration_path, given.finetuning_path)),
    )
    losses = []
    for sequence in sequences.ids.to(given.device):
        logits = model(sequence[None]).logits[0, :-1].float()
        losses.append(float(nn.functional.cross_entropy(logits, sequence[1:].long())))
    return fmean(losses)


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


def order(cell: Cell, given: argparse.Namespace, length: int | None = None) -> AttemptOrder:
    """The job of a cell; its calibration in sequences of `length` tokens, or of as many as its preset says."""
    model, calibration, valid = (str(Path(p).resolve()) for p in (given.model, given.calibration, given.valid))
    from_file = cell.text == "file"
    dataset = {"source": "local", "path": calibration} if from_file else {"source": cell.text}
    training = None if cell.training is None else str(Path(given.training).resolve())
    body = {
        "model": model,
        "quantization": dict(cell.quantization),
        "calibration": {"dataset": dataset} | ({} if length is None else {"sequence_length": length}),
        "evaluation": {
            "dataset": {"source": "local", "path": valid},
            "num_samples": 32,
            "sequence_length": 1024,
        },
        "formats": ["native"],
        "seed": cell.seed,
    } | _training_parts(cell, training)
    return AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=calibration if from_file else None,
        evaluation_path=valid,
        finetuning_path=training,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _training_parts(cell: Cell, text: str | None) -> dict[str, Any]:
    """Fields of a request that describe its adapter, training text included."""
    if cell.training is None:
        return {}
    finetune = {**cell.training["finetune"], "dataset": {"source": "local", "path": text}}
    formats = ["native"] if cell.training["merge"] == "quantized" else ["merged"]
    return {**cell.training, "finetune": finetune, "formats": formats}


if __name__ == "__main__":
    main()
