"""The service's GGUF files beside llama.cpp's, of one calibration text, judged by llama.cpp on another.

    npm install --ignore-scripts node-llama-cpp@3.22.1        # in any folder; brings llama.cpp's libraries
    python -m benchmarks.gguf MODEL --llama-cpp FOLDER --calibration calibration.jsonl --valid valid.jsonl \
        --tables types mixes time --output rows.jsonl
    python -m benchmarks.gguf --llama-cpp FOLDER --calibration calibration.jsonl --valid valid.jsonl \
        --tables trained --train-text train.jsonl --seeds 0 1 2

`types`: all Q8_0, only ffn_down in one type. `mixes`: whole models by llama.cpp's names, with its own rounding and an
imatrix, ours with the same types, and ours with types chosen for a file no larger. `trained`: both of a small model
that is trained first, for each seed another, whose rows are all whole super-blocks. `time`: seconds of light jobs. The
imatrix is the mean square of inputs over the very sequences that calibrate our jobs. Rows are printed as they become
known, and as tables at the end; percentages have the standard error over sequences of the judging text.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.against_auto_round import read_text
from benchmarks.gguf import rows as plans
from benchmarks.gguf.durations import durations
from benchmarks.gguf.originals import Texts
from benchmarks.gguf.rows import MIXES, OURS, TYPES, Row
from benchmarks.gguf.subject import Machine, Subject
from benchmarks.gguf.table import HEADER, baseline_of, over_seeds, row_of, tables
from benchmarks.gguf.trained import write_trained

STARTED = time.monotonic()
BUDGET_ARMS = ("signround light", "signround default", "signround best")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a checkpoint; for trained none is needed")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="where its libraries are")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=["types", "mixes", "trained", "time"], default=["types"])
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=["q2_k", "q3_k", "iq3_s", "q4_k"])
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), default=["q2_k", "q3_k_m", "q4_k_m"])
    parser.add_argument("--arms", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--mix-arms", nargs="*", choices=list(OURS), default=list(BUDGET_ARMS))
    parser.add_argument("--budget-arms", nargs="*", choices=list(OURS), default=list(BUDGET_ARMS))
    parser.add_argument("--samples", type=int, default=128, help="of the calibration text")
    parser.add_argument("--length", type=int, default=2048, help="of one of them, in tokens")
    parser.add_argument("--sequences", type=int, default=16, help="of the text that judges")
    parser.add_argument("--judged-length", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--judges", type=int, default=4, help="files that llama.cpp reads at a time")
    parser.add_argument("--train-text", type=Path, nargs="+")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--train-blocks", type=int, default=6)
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--more-seeds", type=int, nargs="*", default=[], help="of which the first mix alone is made")
    parser.add_argument("--turns", type=int, default=2, help="of time, after one that warms")
    parser.add_argument("--minutes", type=float, help="no row begins later than that after the start")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    given = parsed()
    known: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        with machine(given, given.workers) as where:
            for seed in [*given.seeds, *given.more_seeds]:
                asked = given if seed in given.seeds else smallest(given)
                if {"types", "mixes"} & set(asked.tables):
                    measure(asked, where, asked.model, planned(asked), seed, Path(folder), known)
                if "trained" in asked.tables:
                    train_and_measure(asked, where, seed, Path(folder), known)
        print(tables(known), over_seeds(known), sep="\n", flush=True)
        if "time" in given.tables:
            with machine(given, 1) as where:
                fields = texts_of(given).fields()
                for line in durations(given.model.resolve(), where, fields, given.mixes, given.turns, Path(folder)):
                    print(line, flush=True)


def smallest(given: argparse.Namespace) -> argparse.Namespace:
    """What is asked of a further seed: the first mix, and no type by itself."""
    tables = [table for table in given.tables if table in ("mixes", "trained")]
    return argparse.Namespace(**{**vars(given), "tables": tables, "types": [], "mixes": given.mixes[:1]})


@contextmanager
def machine(given: argparse.Namespace, workers: int) -> Iterator[Machine]:
    until = STARTED + (math.inf if given.minutes is None else 60 * given.minutes)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield Machine(given.device, given.llama_cpp.resolve(), pool, workers, given.judges, until)


def texts_of(given: argparse.Namespace) -> Texts:
    return Texts(given.calibration.resolve(), given.valid.resolve(), given.samples, given.length)


def planned(given: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    if "types" in given.tables:
        rows += plans.ffn_down(given.types, given.arms)
    if "mixes" in given.tables:
        rows += plans.mixes(given.mixes, given.mix_arms, given.budget_arms)
    return rows


def train_and_measure(
    given: argparse.Namespace, where: Machine, seed: int, folder: Path, known: list[dict[str, Any]]
) -> None:
    """A model of its own for each seed, and both kinds of rows on it."""
    model, text = folder / f"trained-{seed}", "\n\n".join(read_text(str(file)) for file in given.train_text)
    started = time.perf_counter()
    shape = {"steps": given.train_steps, "blocks": given.train_blocks, "batch": given.train_batch}
    loss = write_trained(model, text, device=given.device, seed=seed, **shape)
    print(f"trained with seed {seed} to a loss of {loss:.3f} in {time.perf_counter() - started:.0f} s", flush=True)
    types = [kind for kind in given.types if kind in ("q2_k", "q3_k")]
    mixes = [name for name in given.mixes if name in ("q2_k", "q3_k_m")]
    rows = [*plans.one_type(types, given.arms), *plans.mixes(mixes, given.mix_arms, given.budget_arms)]
    measure(given, where, model, rows, seed, folder, known, name="trained here")


def measure(
    given: argparse.Namespace,
    where: Machine,
    model: Path,
    rows: list[Row],
    seed: int,
    folder: Path,
    known: list[dict[str, Any]],
    name: str | None = None,
) -> None:
    """All rows of a model, printed as they become known."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        subject = Subject(model.resolve(), Path(own), where, texts_of(given), seed)
        started = time.perf_counter()
        original = subject.prepare(given.sequences, given.judged_length)
        told = {"table": "original", "subject": "", "name": "F32", "seed": seed}
        name = name or model.name
        places = {(row.table, row.subject, row.name): place for place, row in enumerate(rows)}
        print(f"{name}: {os.cpu_count()} processors, prepared in {time.perf_counter() - started:.0f} s\n{HEADER}")
        print(row_of(told | original, None), flush=True)
        for found in subject.results(rows):
            place = places[found["table"], found["subject"], found["name"]]
            row = found | {"model": name, "place": place}
            known.append(row)
            at = f" <!-- {found['table']}, seed {seed}, at {time.perf_counter() - started:.0f} s -->"
            print(row_of(row, baseline_of(row, known)) + at, flush=True)
            if given.output is not None:
                with given.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
