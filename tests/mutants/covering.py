"""The default tests that run a line of the sources, from one run of them under coverage.

The run leaves out the tests of whole services (`WHOLE`), which reach every line and would be chosen for all of them.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from coverage import CoverageData

from tests.documentation import ROOT
from tests.mutants.tree import DEFAULT

WHOLE = ("documents", "e2e", "cli", "bitwright", "client", "benchmarks")
"""Folders of tests whose every test runs most of the product."""

COVERED = ("app", "workers")
PLACE = ROOT / ".cache" / "mutants"


@dataclass(frozen=True)
class CoverageMap:
    """Tests by the line that they run.

    lines     file -> line -> ids of tests
    seconds   id -> seconds that the test took, its fixtures included
    """

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]

    def choose(self, file: str, lines: Iterable[int], budget: float) -> list[str]:
        """Tests that run one of the lines, the quickest first, as many as the budget of seconds allows; at least five.

        Lines that run when a module is imported belong to no test: then tests of the file's other lines, those in the
        folder that mirrors the file's first, within twice the budget.
        """
        by_line = self.lines.get(file, {})
        tests = {test for line in lines for test in by_line.get(line, [])}
        if tests:
            return self._quickest(tests, "", budget)
        mirror = "/".join(("tests", *Path(file).parent.parts[1:]))
        return self._quickest({test for ids in by_line.values() for test in ids}, mirror, 2 * budget)

    def _quickest(self, tests: Iterable[str], first: str, budget: float) -> list[str]:
        """The quickest tests whose seconds fit into the budget; those of the folder `first` before others."""
        chosen, spent = list[str](), 0.0
        for test in sorted(tests, key=lambda test: (not test.startswith(first), self.seconds.get(test, 1.0), test)):
            spent += self.seconds.get(test, 1.0)
            if spent > budget and len(chosen) >= 5:
                break
            chosen.append(test)
        return chosen


def coverage_map() -> CoverageMap:
    """The map of this tree; made, in some minutes, where sources or tests have changed since the last one."""
    kept = PLACE / f"map-{fingerprint()}.json"
    if not kept.exists():
        mapped = make_map()
        PLACE.mkdir(parents=True, exist_ok=True)
        for older in PLACE.glob("map-*.json"):
            older.unlink()
        kept.write_text(json.dumps(asdict(mapped)))
        return mapped
    stored = json.loads(kept.read_text())
    lines = {file: {int(line): ids for line, ids in by_line.items()} for file, by_line in stored["lines"].items()}
    return CoverageMap(lines, stored["seconds"])


def fingerprint() -> str:
    """A hash of everything that the map depends on."""
    digest = hashlib.sha256()
    for folder in (*COVERED, "bitwright", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "mutants" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def make_map() -> CoverageMap:
    """Run the tests under coverage, each as a context of its own, in two processes.

    Raises:
        CalledProcessError: tests fail without any mistake.
    """
    PLACE.mkdir(parents=True, exist_ok=True)
    data, durations = PLACE / "coverage.db", PLACE / "durations.jsonl"
    durations.unlink(missing_ok=True)
    settings = PLACE / "coveragerc"
    settings.write_text(f"[run]\nsource =\n    {ROOT / 'app'}\n    {ROOT / 'workers'}\n")
    folders = [f"--ignore={ROOT / 'tests' / name}" for name in WHOLE]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", DEFAULT, *folders]
    command += [
        "-p",
        "tests.mutants.durations",
        "--cov",
        f"--cov-config={settings}",
        "--cov-context=test",
        "--cov-report=",
    ]
    environment = {**os.environ, "COVERAGE_FILE": str(data), "BITWRIGHT_TEST_DURATIONS": str(durations)}
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    print(f"the coverage map took {time.monotonic() - started:.0f} s", flush=True)
    return CoverageMap(read_lines(data), read_durations(durations))


def read_lines(file: Path) -> dict[str, dict[int, list[str]]]:
    """File -> line -> ids of the tests that ran it, of a database of coverage."""
    data = CoverageData(basename=str(file))
    data.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for measured in data.measured_files():
        by_line: defaultdict[int, list[str]] = defaultdict(list)
        for line, contexts in data.contexts_by_lineno(measured).items():
            by_line[line] = sorted({context.partition("|")[0] for context in contexts} - {""})
        lines[Path(measured).relative_to(ROOT).as_posix()] = dict(by_line)
    return lines


def read_durations(file: Path) -> dict[str, float]:
    """Id -> seconds of a test's setup, call and teardown."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        seconds[entry["test"]] += entry["seconds"]
    return dict(seconds)
