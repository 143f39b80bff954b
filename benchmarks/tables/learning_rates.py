"""The learning rate of each arm of the table of finetuning, searched where the table does not look.

    python -m benchmarks.tables.learning_rates MODEL --calibration calibration.jsonl --training train.jsonl --bits 3

Each arm trains at each of `RATES` as its cell does, seed 0, on nine tenths of the training text; the other tenth is
the validation after the last step. The text that the table is measured on is not read. One JSON line per job, and at
the end one with the best rate of each arm; a best rate at either end of `RATES` says that the search was too narrow.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.tables.cells import Cell
from benchmarks.tables.finetuning_cells import ARMS, BUDGETS, cell
from benchmarks.tables.results import base_of, order
from bitwright.errors import NumericalFailure
from workers.engine.reporter import Reporter
from workers.engine.run import run

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
VALIDATION_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--training", required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, default=list(BUDGETS))
    given = parser.parse_args()
    given.valid = given.training  # of which an order only names the path: nothing is evaluated
    by_arm: dict[str, dict[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm, rate, searched in searches(given):
            loss = validation_loss(searched, given, Path(folder))
            print(json.dumps({"arm": arm, "rate": rate, "loss": loss}), flush=True)
            if loss is not None:
                by_arm.setdefault(arm, {})[rate] = loss
    print(json.dumps({arm: min(losses, key=losses.__getitem__) for arm, losses in by_arm.items()}))


def searches(given: argparse.Namespace) -> Iterator[tuple[str, float, Cell]]:
    """Rows, rates and their cells; those of one base one after another."""
    for name in given.only:
        for budget in given.budgets:
            if budget not in ARMS[name].ranks:
                continue
            searched = cell(name, ARMS[name], budget, given.bits, seed=0)
            for rate in RATES:
                yield searched.arm, rate, with_rate(searched, rate)


def with_rate(searched: Cell, rate: float) -> Cell:
    """The cell with another rate, and with a share for validation."""
    assert searched.training is not None
    finetune = {**searched.training["finetune"], "learning_rate": rate, "validation_share": VALIDATION_SHARE}
    return replace(searched, training={**searched.training, "finetune": finetune})


def validation_loss(searched: Cell, given: argparse.Namespace, folder: Path) -> float | None:
    """The loss on the share for validation, after the last step; None where training failed.

    Jobs with the same base share its blocks.
    """
    wanted = order(searched, given)
    wanted = wanted.model_copy(update={"request": wanted.request.model_copy(update={"evaluation": None})})
    workspace = folder / base_of(searched)
    workspace.mkdir(exist_ok=True)
    try:
        finetuning = run(wanted, workspace, Reporter(lambda _: None)).report.finetuning
    except NumericalFailure:
        return None
    shutil.rmtree(workspace / "output")
    assert finetuning is not None
    return finetuning.validations[-1].loss


if __name__ == "__main__":
    main()
