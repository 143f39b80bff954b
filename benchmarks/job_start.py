"""Seconds from POST to succeeded of a small job through the whole service, without a spare and with one, in turns.

    python -m benchmarks.job_start [MODEL] --pairs 6 --idle 15

Two services (`bitwright serve`, one worker each) stand side by side, and one of them works at a time. Each round
measures an import of torch and transformers' Llama in a fresh Python, then the same job at each service after `--idle`
seconds, in turns which goes first. Times are the service's own, from the job's row to its end. Prints a JSON line per
round, and one with medians, medians of the ratios to the import of the same round, and a time line of the last job of
each kind.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

from app.cli.embedded import EmbeddedService
from bitwright import Client

IMPORT = "import torch; from transformers.models.llama import modeling_llama"
KINDS = ("none", "spare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the tiny one of the tests")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--preset", default="", help="empty: the method's own")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--idle", type=float, default=15.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--queued", type=int, default=0, help="beside: so many jobs at once to the service with a spare"
    )
    arguments = parser.parse_args()
    model = arguments.model or _tiny_model()
    with ExitStack() as stack:
        clients = {kind: stack.enter_context(_service(stack, model, kind, arguments.device)) for kind in KINDS}
        for client in clients.values():  # what only a worker's first job pays for
            _run(client, arguments, model)
        time.sleep(arguments.idle)
        _say({"idle": _idle_memory()})
        runs = [_round(number, clients, arguments, model) for number in range(arguments.pairs)]
        _say(_summary(runs))
        if arguments.queued:
            _say(_queue(clients["spare"], arguments, model))


def _tiny_model() -> Path:
    from tests.tiny_model import tiny_model_folder

    return tiny_model_folder()


def _service(stack: ExitStack, model: Path, kind: str, device: str) -> Client:
    """A client of a service whose worker has a spare, or has none."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"job-start-{kind}-")))
    os.environ["BITWRIGHT_SPARES"] = "1" if kind == "spare" else "0"
    service = stack.enter_context(EmbeddedService(folder, model_roots=[model.resolve().parent], device=device))
    return service.client()


def _round(number: int, clients: dict[str, Client], arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
    found: dict[str, Any] = {"import": round(time.monotonic() - began, 3)}
    for kind in KINDS if number % 2 == 0 else reversed(KINDS):
        time.sleep(arguments.idle)
        found[kind] = _run(clients[kind], arguments, model)
    _say({"round": number, "import": found["import"], **{kind: found[kind]["seconds"] for kind in KINDS}})
    return found


def _run(client: Client, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One job: seconds from its row to its end, and when its events came."""
    body: dict[str, Any] = {"model": str(model.resolve()), "method": arguments.method, "bits": 4}
    body |= {"preset": arguments.preset} if arguments.preset else {}
    body["metadata"] = {"run": str(time.monotonic_ns())}
    job = client.wait(client.submit(body).id)
    if job.finished_at is None or job.report is None:
        raise SystemExit(f"{job.id} {job.status.value}: {job.error}")
    line = [
        (round((view.created_at - job.created_at).total_seconds(), 2), _name(view.event))
        for view in client.events(job.id)
    ]
    line.append((round((job.finished_at - job.created_at).total_seconds(), 2), "finished"))
    stages = {name: round(value, 3) for name, value in job.report.seconds.items()}
    return {"seconds": (job.finished_at - job.created_at).total_seconds(), "line": line, "stages": stages}


def _name(event: Any) -> str:
    said = event.model_dump()
    return " ".join(
        str(said[name]) for name in ("type", "event", "status", "stage", "done") if said.get(name) is not None
    )


def _idle_memory() -> dict[str, Any]:
    """MB that the waiting spare holds of the machine's memory, and that all processes hold of the GPUs'."""
    lines = {path.parent: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    held = [(folder / "status").read_text() for folder, line in lines.items() if b"--spare" in line]
    sizes = [int(line.split()[1]) // 1024 for text in held for line in text.splitlines() if line.startswith("VmRSS")]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout if which("nvidia-smi") else ""
    # The smaller one of the two is the guard, which was forked before anything was imported.
    return {"spare_mb": max(sizes, default=0), "gpu_mb": [int(size) for size in gpu.split()]}


def _queue(client: Client, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Average seconds of several jobs that are submitted at once."""
    time.sleep(arguments.idle)
    body = {"model": str(model.resolve()), "method": arguments.method, "bits": 4}
    began = time.monotonic()
    ids = [client.submit({**body, "metadata": {"queued": str(n)}}).id for n in range(arguments.queued)]
    for job_id in ids:
        client.wait(job_id)
    return {"queued": arguments.queued, "seconds_each": round((time.monotonic() - began) / arguments.queued, 3)}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "import": median(run["import"] for run in runs),
        **{kind: round(median(run[kind]["seconds"] for run in runs), 3) for kind in KINDS},
        **{
            f"{kind} / import": round(median(run[kind]["seconds"] / run["import"] for run in runs), 3) for kind in KINDS
        },
        "spare / none": round(median(run["spare"]["seconds"] / run["none"]["seconds"] for run in runs), 3),
        "last": {kind: {"line": runs[-1][kind]["line"], "stages": runs[-1][kind]["stages"]} for kind in KINDS},
    }


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
