"""The cost of reading one block back before tuning: the same job with `verify` off and block, in turns.

    python -m benchmarks.loading.reading_back MODEL --pairs 3 --samples 16 --length 256

Attempts are processes of their own, as a worker starts them; the child that reads is lent to one after another, and the
first that reads pays for its start. Prints a JSON line per attempt and one with the ratios: wall time, and processor
time of attempt and child together, which other work on the machine disturbs less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder, RuntimePlace
from workers.supervise.runtimes import WarmReader

TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", default="signround")
    parser.add_argument("--preset", default="light", help="empty: the method has none")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reader = WarmReader(Path(folder))
        runs = dict[str, list[dict[str, Any]]]({"off": [], "block": []})
        for pair in range(arguments.pairs):
            for verify in ("off", "block") if pair % 2 == 0 else ("block", "off"):
                run = attempt(body_of(arguments, verify), Path(folder) / f"{pair}-{verify}", reader)
                sys.stdout.write(json.dumps({"verify": verify, **run}) + "\n")
                sys.stdout.flush()
                runs[verify].append(run)
        reader.close()
    ratios = {key: mean(r[key] for r in runs["block"]) / mean(r[key] for r in runs["off"]) for key in ("wall", "cpu")}
    sys.stdout.write(json.dumps({"block / off": ratios}) + "\n")


def body_of(arguments: argparse.Namespace, verify: str) -> dict[str, Any]:
    text = {"num_samples": arguments.samples, "sequence_length": arguments.length}
    return {
        "model": str(arguments.model),
        "method": arguments.method,
        **({"preset": arguments.preset} if arguments.preset else {}),
        "bits": 4,
        "group_size": 64,
        "calibration": text,
        "evaluation": {"num_samples": 4, "sequence_length": arguments.length},
        "verify": verify,
    }


def attempt(body: dict[str, Any], workspace: Path, reader: WarmReader) -> dict[str, Any]:
    """Seconds of an attempt, by the wall and of processors, and what it says of itself."""
    workspace.mkdir()
    reads = body["verify"] != "off"
    started, before = time.perf_counter(), _children()
    with reader.lent() if reads else nullcontext() as warm:
        order = AttemptOrder(
            job_id="job_1",
            attempt=1,
            request=JobRequest.parse(body),
            model_path=body["model"],
            device="cpu",
            runtimes={"transformers": RuntimePlace(version=version("transformers"))} if reads else {},
            warm=warm,
        )
        given = () if warm is None else (warm.orders, warm.answers)
        (workspace / "order.json").write_text(order.model_dump_json())
        code = "import sys; from benchmarks.loading.reading_back import obey; obey(sys.argv[1])"
        # One that was just started has used nothing yet, so that its start counts.
        child = _of_reader(warm.pid) if warm else 0.0
        done = subprocess.run(
            [sys.executable, "-c", code, str(workspace)], pass_fds=given, check=True, capture_output=True, text=True
        )
        reading = _of_reader(warm.pid) - child if warm else 0.0
    told = json.loads(done.stdout.splitlines()[-1])
    return {"wall": time.perf_counter() - started, "cpu": _children() - before + reading, **told}


def obey(workspace: str) -> None:
    """An attempt, in this process."""
    from workers.engine.reporter import Reporter
    from workers.engine.run import run

    folder = Path(workspace)
    order = AttemptOrder.model_validate_json((folder / "order.json").read_bytes())
    report = run(order, folder, Reporter(lambda _: None)).report
    loads = [f"{load.runtime} {load.result}" for load in report.loads]
    sys.stdout.write(json.dumps({"stages": report.seconds, "loads": loads}) + "\n")


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _of_reader(pid: int) -> float:
    """Processor seconds of the child and of what it has forked and waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


if __name__ == "__main__":
    main()
