"""`python -m tests.mutants listed [ID ...]` and `python -m tests.mutants sampled [--minutes 27] [--seed 0]`."""

import argparse
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests import servers
from tests.mutants.listed_mistakes import Mistake, listed
from tests.mutants.tree import Outcome, Tree, make_tree

PROCESSES = 2
TESTS_SECONDS = 20.0
"""Tests chosen for a drawn mistake took at most so long when the map was made."""
LIMIT_SECONDS = 180.0
"""A mistake whose tests take longer is endless."""
DATABASE = "BITWRIGHT_TEST_DATABASE_URL"
MAY_LIVE = Path(__file__).parent / "may_live.toml"


@dataclass(frozen=True)
class Trial:
    """A mistake to try: its name, its file, the text with it, and the tests that shall notice."""

    name: str
    file: str
    text: str
    shown: str
    tests: Sequence[str]
    group: str


def try_all(
    trials: Iterator[Trial],
    until: float,
    report: Callable[[Trial, Outcome], None],
    tests: Sequence[str] = (),
) -> None:
    """Try mistakes in two copies of the tree until there are no more, or until that time (monotonic, s).

    Raises:
        ValueError: pytest does not know some of `tests` in a tree without a mistake.
    """
    lock = threading.Lock()

    def work(tree: Tree) -> None:
        while time.monotonic() < until:
            with lock:
                trial = next(trials, None)
            if trial is None:
                return
            tree.write(trial.file, trial.text)
            try:
                outcome = tree.run(trial.tests, LIMIT_SECONDS)
            finally:
                tree.restore(trial.file)
            with lock:
                report(trial, outcome)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        url = servers.text(stack.enter_context(servers.postgres_server()))
        trees = [make_tree(folder / str(number), {DATABASE: url}) for number in range(PROCESSES)]
        if tests and not trees[0].collects(tests):
            raise ValueError("pytest does not find all tests that the list names: see its --collect-only")
        with ThreadPoolExecutor(len(trees)) as pool:
            for worker in [pool.submit(work, tree) for tree in trees]:
                worker.result()


def run_listed(wanted: Sequence[str]) -> int:
    """Try the listed mistakes, or those named; their own tests first, more where those do not notice.

    Returns:
        The number of mistakes that the tests do not notice.
    """
    mistakes = [mistake for mistake in listed() if not wanted or mistake.id in wanted]
    outcomes = dict[str, Outcome]()

    def report(trial: Trial, outcome: Outcome) -> None:
        print(f"{outcome:9}  {trial.name}  {trial.file}", flush=True)
        outcomes[trial.name] = outcome

    tests = sorted({test for mistake in mistakes for test in mistake.tests})
    try_all((_listed_trial(mistake) for mistake in mistakes), float("inf"), report, tests)
    noticed = {name for name, outcome in outcomes.items() if outcome is not Outcome.UNNOTICED}
    print(f"{len(noticed)} of {len(mistakes)} listed mistakes are noticed")
    unmet = [mistake.id for mistake in mistakes if mistake.id not in noticed]
    for name in unmet:
        print(f"{'not noticed' if name in outcomes else 'not tried'}: {name}")
    return len(unmet)


def _listed_trial(mistake: Mistake) -> Trial:
    return Trial(mistake.id, mistake.file, mistake.text(), mistake.damage, mistake.tests, "listed")


def run_sampled(minutes: float, seed: int) -> int:
    """Try drawn mistakes, one folder after the other, until the time is over; print shares and survivors.

    Returns:
        The number of folders under 70 %, and one more where all together are under 80 %.
    """
    from tests.mutants.covering import coverage_map
    from tests.mutants.sample import FOLDERS, Mutant, draw

    until = time.monotonic() + minutes * 60
    cover, reasons = coverage_map(), may_live()
    noticed, tried, lives = dict.fromkeys(FOLDERS, 0), dict.fromkeys(FOLDERS, 0), list[Trial]()

    def trial(folder: str, mutant: Mutant) -> Trial:
        lines = range(mutant.lines[0], mutant.lines[1] + 1)
        tests = cover.choose(mutant.file, lines, TESTS_SECONDS)
        return Trial(mutant.name, mutant.file, mutant.text, mutant.shown(), tests, folder)

    def drawn() -> Iterator[Trial]:
        draws = {folder: draw(folder, seed) for folder in FOLDERS}
        while draws:
            for folder in list(draws):
                mutant = next(draws[folder], None)
                if mutant is None:
                    del draws[folder]
                elif mutant.shown() not in reasons:
                    yield trial(folder, mutant)

    def report(trial: Trial, outcome: Outcome) -> None:
        tried[trial.group] += 1
        noticed[trial.group] += outcome is not Outcome.UNNOTICED
        if outcome is Outcome.UNNOTICED:
            lives.append(trial)
            print(f"not noticed: {trial.name}  {trial.shown}  ({len(trial.tests)} tests)", flush=True)

    try_all(drawn(), until, report)
    share = {folder: noticed[folder] / max(tried[folder], 1) for folder in FOLDERS}
    for folder in FOLDERS:
        print(f"{folder:20} {noticed[folder]:4} of {tried[folder]:4} noticed, {share[folder]:.0%}")
    every = sum(noticed.values()) / max(sum(tried.values()), 1)
    print(f"{'all':20} {sum(noticed.values()):4} of {sum(tried.values()):4} noticed, {every:.0%}")
    return sum(value < 0.7 for value in share.values()) + (every < 0.8)


def may_live() -> dict[str, str]:
    """Mistakes that change nothing which anybody could observe, as `shown` describes them -> the reason."""
    return {entry["shown"]: entry["why"] for entry in tomllib.loads(MAY_LIVE.read_text())["mutant"]}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("listed").add_argument("ids", nargs="*")
    sampled = commands.add_parser("sampled")
    sampled.add_argument("--minutes", type=float, default=27.0)
    sampled.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unmet = run_listed(options.ids) if options.command == "listed" else run_sampled(options.minutes, options.seed)
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
