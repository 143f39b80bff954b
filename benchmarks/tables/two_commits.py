"""KL divergence of twelve cells by two commits, at equal settings and seeds, side by side in one run.

    git archive BEFORE | tar x -C OTHER
    python -m benchmarks.tables.two_commits MODEL --calibration calibration.jsonl --valid valid.jsonl --before OTHER \
        --seconds 180 --output two-commits.jsonl

One process for each side has its own tree's code alone and runs whole jobs, seed 0 of all cells before the next seed;
a JSON line a job, and a run goes on where the last one ended. The last lines have, by cell, the mean KL of both sides,
and the mean logarithm of their ratio at equal seeds with its standard error, in percent. Fewer and shorter sequences
than the presets' make it minutes on one GPU; both sides have the same.
"""

import argparse
import json
import math
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

SIDES = ("before", "now")
PLACES = {
    "AttemptOrder": ("workers.disk.orders", "app.domain.events"),
    "JobRequest": ("app.domain.request.job_request", "app.domain.jobs"),
    "run": ("workers.engine.run", "workers.engine.pipeline"),
    "Reporter": ("workers.engine.reporter",),
}
"""Where commits since 2026-11-28 have what runs a job, the latest first."""
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "omniquant": {"method": "omniquant", "epochs": 20},
    "signround light": {"method": "signround", "steps": 50},
    "signround default": {"method": "signround", "steps": 200},
    "signround best": {"method": "signround", "steps": 200, "scale_steps": 100},
    "apiq block": {"method": "apiq", "granularity": "block", "steps": 512},
}
"""Everything that a preset would fill in is said: presets may have changed in between."""
CELLS = [(name, 2) for name in METHODS] + [(name, 3) for name in list(METHODS)[:4]]
WITHOUT_SEED = {"rtn"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--before", type=Path, required=True, help="tree of the earlier commit")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), help="methods; else all")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=540, help="begin no job later than this")
    parser.add_argument("--output", type=Path, default=Path("two-commits.jsonl"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        _measure(given)
        return
    trees = {"before": given.before.resolve(), "now": Path(__file__).resolve().parents[2]}
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--side"]
    running = [
        subprocess.Popen([*command, side], env=os.environ | {"PYTHONPATH": str(tree)}) for side, tree in trees.items()
    ]
    failed = [process.wait() for process in running]
    for line in summary(_lines(given.output)):
        print(json.dumps(line), flush=True)
    sys.exit(int(any(failed)))


def _measure(given: argparse.Namespace) -> None:
    """The jobs of one side that no line is there of, until it is time."""
    until = time.monotonic() + given.seconds
    done = {(line["side"], line["cell"], line["seed"]) for line in _lines(given.output)}
    for name, bits, seed in _wanted(given.seeds, given.only or list(METHODS)):
        cell = f"{name} W{bits}"
        if (given.side, cell, seed) in done:
            continue
        if time.monotonic() > until:
            print(f"{given.side}: not all jobs were run; run this again", flush=True)
            return
        line = {"side": given.side, "cell": cell, "seed": seed} | _figures(given, {**METHODS[name], "bits": bits}, seed)
        with given.output.open("a") as output:
            output.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def _wanted(seeds: Sequence[int], methods: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for number, seed in enumerate(seeds):
        for name, bits in CELLS:
            if name in methods and (number == 0 or name not in WITHOUT_SEED):
                yield name, bits, seed


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n") if line] if file.exists() else []


def _figures(given: argparse.Namespace, quantization: dict[str, Any], seed: int) -> dict[str, Any]:
    order_type, request, run, reporter = (_found(name) for name in PLACES)
    body = {
        "model": given.model,
        "quantization": {"group_size": 64, "symmetric": False, **quantization},
        "calibration": {
            "dataset": {"source": "local", "path": given.calibration},
            "num_samples": given.sequences,
            "sequence_length": given.length,
        },
        "evaluation": {
            "dataset": {"source": "local", "path": given.valid},
            "num_samples": given.sequences,
            "sequence_length": given.length,
        },
        "formats": ["native"],
        "seed": seed,
        **({"verify": "off"} if "verify" in request.model_fields else {}),
    }
    order = order_type(
        job_id="job_benchmark",
        attempt=1,
        request=request.parse(body),
        model_path=given.model,
        calibration_path=given.calibration,
        evaluation_path=given.valid,
        device=given.device,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as workspace:
        report = run(order, Path(workspace), reporter(lambda _: None)).report
    quality, text = report.quality, report.calibration
    return {
        "kl": round(quality.kl_divergence, 5),
        "perplexity": round(quality.perplexity, 4),
        "text": None if text is None else text.sha256[:12],
        "seconds": round(time.monotonic() - started, 2),
    }


def _found(name: str) -> Any:
    """What this side's tree calls by a name."""
    for place in PLACES[name]:
        try:
            return pkgutil.resolve_name(f"{place}:{name}")
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"no {name} in {PLACES[name]}")


def summary(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line a cell that both sides have."""
    for cell in dict.fromkeys(line["cell"] for line in lines):
        by_side = {
            side: {line["seed"]: line["kl"] for line in lines if (line["side"], line["cell"]) == (side, cell)}
            for side in SIDES
        }
        before, now = (by_side[side] for side in SIDES)
        ratios = [100 * math.log(now[seed] / before[seed]) for seed in before if seed in now]
        if ratios:
            error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
            yield {
                "cell": cell,
                "seeds": len(ratios),
                **{side: round(fmean(found.values()), 5) for side, found in by_side.items()},
                "percent": round(fmean(ratios), 2),
                "error": round(error, 2),
            }


if __name__ == "__main__":
    main()
