"""KL divergence of SignRound's whole jobs by steps, sequences a step and products of gradients, seed by seed.

    python -m benchmarks.blocks.schedule_quality MODEL --calibration calibration.jsonl --valid valid.jsonl \\
        --cases 200/8 200/8/0.5/eight_bits --seeds 0 1 2 3 --seconds 240

Cases are those of `benchmarks.blocks.schedule_probe`; "eight_bits" computes gradients in FP8 on a small model, too,
where that is no quicker. One JSON line a job, all cases of a seed before the next seed; with `--output` a run goes on
where the last one ended. The last line has each case's mean, and its difference from the first case's with its
standard error.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.blocks.schedule_probe import scheduled
from benchmarks.tables.cells import Cell
from benchmarks.tables.results import order
from workers.engine.reporter import Reporter
from workers.engine.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--blocks", type=int, help="of the model, which is cut after them: several times quicker")
    parser.add_argument("--length", type=int, help="tokens of a calibration sequence; else the preset's")
    parser.add_argument("--seconds", type=float, default=540, help="begin no job later than this")
    parser.add_argument("--output", type=Path, default=Path("schedule-quality.jsonl"))
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        if given.blocks is not None:
            given.model = cut(given.model, given.blocks, Path(folder))
        measure(given, until)


def cut(model: str, blocks: int, folder: Path) -> str:
    """The model without what comes after its first blocks, in `folder`."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    whole.model.layers = whole.model.layers[:blocks]
    whole.config.num_hidden_layers = blocks
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def measure(given: argparse.Namespace, until: float) -> None:
    """The jobs that no line is there of, until it is time; and a summary."""
    known = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    done = {(line["case"], line["bits"], line["seed"]) for line in known}
    for seed in given.seeds:
        for bits in given.bits:
            for case in given.cases:
                if (case, bits, seed) in done or time.monotonic() > until:
                    continue
                known.append(measured(given, case, bits, seed))
                with given.output.open("a") as output:
                    output.write(json.dumps(known[-1]) + "\n")
                print(json.dumps(known[-1]), flush=True)
    for bits in given.bits:
        print(json.dumps({"bits": bits} | summary([line for line in known if line["bits"] == bits], given.cases)))


def measured(given: argparse.Namespace, case: str, bits: int, seed: int) -> dict[str, Any]:
    steps, batch, *rest = case.split("/")
    halves, gradients = float(rest[0]) if rest else 0.0, rest[1] if len(rest) > 1 else "exact"
    asked = {"method": "signround", "group_size": 64, "bits": bits, "steps": int(steps), "batch_size": int(batch)}
    asked["quick_steps"] = True
    given_order = order(Cell(case, bits, seed, asked), given, given.length)
    with (
        tempfile.TemporaryDirectory() as folder,
        scheduled(halves, gradients),
    ):
        report = run(given_order, Path(folder) / "job", Reporter(lambda _: None)).report
        shutil.rmtree(Path(folder) / "job")
    assert report.quality is not None
    return {
        "case": case,
        "bits": bits,
        "seed": seed,
        "kl": round(report.quality.kl_divergence, 5),
        "perplexity": round(report.quality.perplexity, 4),
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
    }


def summary(lines: list[dict[str, Any]], cases: list[str]) -> dict[str, Any]:
    """Mean KL by case, and the mean and standard error of log ratios to the first case at equal seeds, in percent."""
    found = {case: {line["seed"]: line["kl"] for line in lines if line["case"] == case} for case in cases}
    means = {}
    for case, by_seed in found.items():
        ratios = [100 * math.log(kl / found[cases[0]][seed]) for seed, kl in by_seed.items() if seed in found[cases[0]]]
        if not ratios:
            continue
        error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
        means[case] = {
            "seeds": len(ratios),
            "kl": round(fmean(by_seed.values()), 5),
            "percent": round(fmean(ratios), 2),
            "error": round(error, 2),
        }
    return means


if __name__ == "__main__":
    main()
