"""`python -m tests.child.newborn ...`: says how it was born, writes into a pipe that it was given, and ends."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import structlog

from workers.child.birth import born
from workers.child.lifeline import REPORT_FD


def main(arguments: list[str]) -> None:
    prepared: list[str] = []

    def prepare(device: str) -> Callable[[], None]:
        prepared.append(device)
        return lambda: prepared.append("begun")

    birth = born(arguments, prepare)
    told = {
        "prepared": prepared,
        "workspace": str(birth.workspace),
        "rank": birth.rank,
        "given": dict(birth.given),
        "score": int(Path("/proc/self/oom_score_adj").read_text()),
    }
    structlog.get_logger("newborn").info("born")
    for descriptor in birth.given.values():
        os.write(descriptor, b"through the given pipe")
    os.write(int(os.environ[REPORT_FD]), json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
