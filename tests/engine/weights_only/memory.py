"""`python -m tests.engine.weights_only.memory MODEL WORKSPACE`: a job without a model, watched from inside.

Prints JSON: the most anonymous memory (RssAnon) above that before the job, the most bytes of disk that source and
workspace took together, and the bytes of what the job made.
"""

import json
import os
import sys
import threading
from pathlib import Path

from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run

FORMATS = ["compressed-tensors"]


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def taken(folder: Path) -> int:
    """Bytes that a folder's files take on the disk, links counted once."""
    found: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(Path(place, name))
            except FileNotFoundError:
                continue
            found[status.st_ino] = status.st_size
    return sum(found.values())


def main(model: Path, workspace: Path, formats: list[str]) -> None:
    quantization = {"method": "rtn", "bits": 4, "group_size": 128}
    body = {"model": str(model), "quantization": quantization, "formats": formats}
    order = AttemptOrder(job_id="job_1", attempt=1, request=JobRequest.parse(body), model_path=str(model), device="cpu")
    before, done = anonymous(), threading.Event()
    peaks = {"anonymous": 0, "disk": 0}

    def watch() -> None:
        while not done.wait(0.02):
            peaks["anonymous"] = max(peaks["anonymous"], anonymous() - before)
            peaks["disk"] = max(peaks["disk"], taken(workspace))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run(order, workspace, Reporter(lambda _: None))
    done.set()
    watcher.join()
    made = taken(workspace / "output")
    seconds = result.report.seconds["total"]
    json.dump({**peaks, "made": made, "before": before, "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or FORMATS)
