"""A pytest plugin that writes how long each test took, one JSON line per phase."""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a phase's seconds. With several processes the one that collects their reports writes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    with open(os.environ["BITWRIGHT_TEST_DURATIONS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": report.nodeid, "seconds": report.duration}) + "\n")
