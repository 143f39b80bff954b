"""A copy of the sources that a page's examples are put into, and Python with the copy's packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.documentation import ROOT

PACKAGES = ("app", "bitwright", "workers", "benchmarks", "tests")
FILES = ("pyproject.toml", "constraints.txt", "requirements-vllm.txt")


def copy_source(folder: Path) -> None:
    """Copy the packages, the tests among them, and the files that tests read."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copyfile(ROOT / name, folder / name)


def python(source: Path, *arguments: str) -> str:
    """Standard output of Python with the copy's packages; a failure is one of the test."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
