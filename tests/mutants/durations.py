"""A pytest plugin that writes how long each test took, one JSON line per phase."""

import json
import os
from pathlib import Path

import pytest

# Read now: tests change the environment.
FILE = Path(os.environ["BITWRIGHT_TEST_DURATIONS"])
COLLECTS = "PYTEST_XDIST_WORKER" not in os.environ
"""With several processes the one that collects their reports writes."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a phase's seconds."""
    if COLLECTS:
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": report.nodeid, "seconds": report.duration}) + "\n")
