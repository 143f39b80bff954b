"""Seconds from POST to succeeded of small jobs through the whole service, without a spare and with one, in turns.

    python -m benchmarks.job_start [MODEL] --pairs 6 --idle 15
    python -m benchmarks.job_start MODEL --device cuda --work rtn signround/light gptq --kinds spare --queued 10

Two services (`bitwright serve`, one worker each) stand side by side, and one of them works at a time. Each round
measures an import of torch and transformers' Llama in a fresh Python, then the same job at each service after it has
been idle for `--idle` seconds, in turns which goes first. Times are the service's own, from the job's row to its end.
Prints JSON lines: what the first job of each service took and what a spare holds while it waits; one per round; for
each kind of work medians, medians of the ratios to the import of the same round, and a profile: seconds between the
events of a job and of the engine's stages.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from shutil import which
from statistics import median
from typing import Any

from app.cli.embedded import EmbeddedService
from bitwright import Client
from bitwright.errors import BitwrightError

IMPORT = "import torch; from transformers.models.llama import modeling_llama"
FREE = "import torch; free, total = torch.cuda.mem_get_info(); print((total - free) >> 20)"
KINDS = ("none", "spare")
SPARE_STARTS_SECONDS = 20.0 if (os.cpu_count() or 1) < 4 else 1.0
"""After a job, until its service's next spare takes no processor from the other service's job."""
EVENTS = ("status", "progress", "log")
"""Types of the events that part a job's time."""


@dataclass
class Service:
    """A running service and when its last job ended."""

    client: Client
    ended: float = field(default_factory=time.monotonic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="default: the tiny one of the tests")
    parser.add_argument("--work", nargs="+", help="METHOD or METHOD/PRESET; in place of the next two")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--preset", default="", help="empty: the method's own")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--pairs", type=int, default=6, help="rounds for each kind of work")
    parser.add_argument("--idle", type=float, default=15.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--queued", type=int, default=0, help="beside: so many jobs of the first work at once, with a spare"
    )
    arguments = parser.parse_args()
    model = arguments.model or _tiny_model()
    works = [_body(name, model) for name in arguments.work or ["/".join((arguments.method, arguments.preset))]]
    with ExitStack() as stack:
        held_before = _gpu_mb(arguments.device)
        services = {kind: _service(stack, model, kind, arguments.device) for kind in arguments.kinds}
        # What only a worker's first job pays for.
        first = {kind: _run(service, works[0])["seconds"] for kind, service in services.items()}
        time.sleep(arguments.idle)
        _say({"first": first, "idle": _idle_memory(arguments.device, held_before)})
        for body in works:
            runs = [_round(number, services, arguments.idle, body) for number in range(arguments.pairs)]
            _say(_name(body) | _summary(runs, arguments.kinds))
        if arguments.queued:
            _say(_queue(services["spare"], arguments, works[0]))


def _tiny_model() -> Path:
    from tests.tiny_model import tiny_model_folder

    return tiny_model_folder()


def _body(work: str, model: Path) -> dict[str, Any]:
    method, _, preset = work.partition("/")
    body: dict[str, Any] = {"model": str(model.resolve()), "method": method, "bits": 4}
    return body | ({"preset": preset} if preset else {})


def _name(body: dict[str, Any]) -> dict[str, str]:
    return {"work": "/".join(filter(None, (body["method"], body.get("preset"))))}


def _service(stack: ExitStack, model: Path, kind: str, device: str) -> Service:
    """A service whose worker has a spare, or has none."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"job-start-{kind}-")))
    os.environ["BITWRIGHT_SPARES"] = "1" if kind == "spare" else "0"
    try:
        service = stack.enter_context(EmbeddedService(folder, model_roots=[model.resolve().parent], device=device))
    except BitwrightError as error:
        raise SystemExit(f"{error}\n{error.hint}") from error
    return Service(service.client())


def _round(number: int, services: dict[str, Service], idle: float, body: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
    found: dict[str, Any] = {"import": round(time.monotonic() - began, 3)}
    for kind in services if number % 2 == 0 else reversed(services):
        service = services[kind]
        until = max(service.ended + idle, *(other.ended + SPARE_STARTS_SECONDS for other in services.values()), 0.0)
        time.sleep(max(0.0, until - time.monotonic()))
        found[kind] = _run(service, body)
    _say(_name(body) | {"round": number} | {k: v["seconds"] if k in services else v for k, v in found.items()})
    return found


def _run(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """One job: seconds from its row to its end, when its events came, and seconds of the engine's stages."""
    client = service.client
    job = client.wait(client.submit(body | {"metadata": {"run": str(time.monotonic_ns())}}).id)
    service.ended = time.monotonic()
    if job.finished_at is None or job.report is None:
        raise SystemExit(f"{job.id} {job.status.value}: {job.error}")
    seconds = (job.finished_at - job.created_at).total_seconds()
    line = [(0.0, "posted")]
    for view in client.events(job.id):
        if (name := _label(view.event.model_dump())) and name not in {known for _, known in line}:
            line.append(((view.created_at - job.created_at).total_seconds(), name))
    line.append((seconds, "end"))
    between = {after: round(late - early, 3) for (early, _), (late, after) in pairwise(line)}
    stages = {name: round(value, 3) for name, value in job.report.seconds.items()}
    return {"seconds": seconds, "until": between, "stages": stages}


def _label(said: dict[str, Any]) -> str:
    """Name of an event that parts a job's time, or nothing."""
    if said.get("type") not in EVENTS:
        return ""
    return str(said.get("status") or said.get("stage") or said.get("event") or "")


def _gpu_mb(device: str) -> int:
    """MB of the first GPU that are held: by all processes, and by the context that asks where nothing else tells."""
    if device != "cuda":
        return 0
    command = [sys.executable, "-c", FREE]
    if which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def _idle_memory(device: str, held_before: int) -> dict[str, Any]:
    """MB that the waiting spare holds of the machine's memory, and that came to be held of the first GPU's."""
    lines = {path.parent: path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    held = [(folder / "status").read_text() for folder, line in lines.items() if b"--spare" in line]
    sizes = [int(line.split()[1]) // 1024 for text in held for line in text.splitlines() if line.startswith("VmRSS")]
    # The smaller one of the two is the guard, which was forked before anything was imported.
    return {"spare_mb": max(sizes, default=0), "gpu_mb": _gpu_mb(device) - held_before}


def _queue(service: Service, arguments: argparse.Namespace, body: dict[str, Any]) -> dict[str, Any]:
    """Average seconds of several jobs that are submitted at once."""
    time.sleep(max(0.0, service.ended + arguments.idle - time.monotonic()))
    client, began = service.client, time.monotonic()
    ids = [client.submit(body | {"metadata": {"queued": str(n)}}).id for n in range(arguments.queued)]
    for job_id in ids:
        client.wait(job_id)
    each = (time.monotonic() - began) / arguments.queued
    return _name(body) | {"queued": arguments.queued, "seconds_each": round(each, 3)}


def _summary(runs: list[dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"import": median(run["import"] for run in runs)}
    for kind in kinds:
        found[kind] = round(median(run[kind]["seconds"] for run in runs), 3)
        found[f"{kind} / import"] = round(median(run[kind]["seconds"] / run["import"] for run in runs), 3)
    if len(kinds) == len(KINDS):
        found["spare / none"] = round(median(run["spare"]["seconds"] / run["none"]["seconds"] for run in runs), 3)
    for kind in kinds:
        found[f"{kind}, until"] = _medians([run[kind]["until"] for run in runs])
        found[f"{kind}, stages"] = _medians([run[kind]["stages"] for run in runs])
    return found


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(run.get(name, 0.0) for run in runs), 3) for name in runs[-1]}


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
