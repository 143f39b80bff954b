"""Seconds from a submission to the start of its attempt, through a real worker that Valkey notifies.

    python -m benchmarks.service.starts --jobs 40

Starts PostgreSQL and `bitwright serve` with one worker that has a spare process, and submits small jobs, each when the
worker has been idle for `--idle` seconds. `taken` is the time until the attempt's row is there, by the database's own
clock, and `begun` until the attempt's process, the spare, says its first word. Prints a JSON line a job, and one of
medians and 95th percentiles.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from app.cli.embedded import EmbeddedService
from bitwright import Client
from tests import servers
from tests.tiny_model import tiny_model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--idle", type=float, default=8.0, help="a spare needs as long to get ready")
    arguments = parser.parse_args()
    model = tiny_model_folder()
    with ExitStack() as stack:
        postgres = stack.enter_context(servers.postgres_server())
        url = servers.text(stack.enter_context(servers.postgres_database(postgres)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="starts-")))
        os.environ |= {"BITWRIGHT_DATABASE_URL": url, "BITWRIGHT_SPARES": "1"}
        service = stack.enter_context(EmbeddedService(folder, model_roots=[model.resolve().parent], device="cpu"))
        client = service.client()
        runs = []
        for number in range(arguments.jobs + 1):
            time.sleep(arguments.idle)
            runs.append(_run(client, model, number))
            print(json.dumps({"job": number, **runs[-1]}), flush=True)
    told = {name: sorted(run[name] for run in runs[1:]) for name in runs[0]}  # the worker's first job makes caches
    late = {name: round(quantiles(values, n=20)[-1], 3) for name, values in told.items()}
    print(json.dumps({"median": {name: round(median(values), 3) for name, values in told.items()}, "p95": late}))


def _run(client: Client, model: Path, number: int) -> dict[str, float]:
    body = {"model": str(model.resolve()), "method": "rtn", "bits": 4, "metadata": {"number": str(number)}}
    job = client.wait(client.submit(body).id)
    first = next(view for view in client.events(job.id) if view.attempt == 1 and view.event.type != "status")
    times = {"taken": job.attempts[0].started_at, "begun": first.created_at, "ended": job.finished_at}
    return {name: round((at - job.created_at).total_seconds(), 3) for name, at in times.items() if at is not None}


if __name__ == "__main__":
    main()
