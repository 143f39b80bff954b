"""The table of results: every cell is a request that the service takes, and what is missing is shown as missing."""

import argparse
import itertools
import json
from pathlib import Path

import pytest

from app.domain.adapters import ADAPTERS
from app.domain.adapters.shapes import shape_for
from benchmarks.tables.cells import GROUP_SIZE, Cell, cells
from benchmarks.tables.finetuning_cells import ARMS, finetuning_cells
from benchmarks.tables.finetuning_table import finetuning_tables
from benchmarks.tables.learning_rates import RATES, VALIDATION_SHARE, searches
from benchmarks.tables.results import missing, order, share
from benchmarks.tables.results_table import lines, tables

CELLS = [*cells(), *finetuning_cells()]
FIGURES = {"perplexity_original": 27.0, "peak_gib": 1.5, "device": "cpu", "bits_per_weight": 4.25, "seconds": 3.0}


def line(cell: Cell, kl: float) -> dict[str, object]:
    named = {"key": cell.key, "arm": cell.arm, "bits": cell.bits, "seed": cell.seed}
    return named | FIGURES | {"kl": kl, "perplexity": 30.0}


def test_keys_are_unique() -> None:
    keys = [cell.key for cell in CELLS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_every_cell_is_a_valid_request(cell: Cell, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    given = argparse.Namespace(model=tmp_path, calibration=a, valid=b, training=c)
    made = order(cell, given).request
    assert made.quantization.method == cell.quantization["method"]
    assert made.seed == cell.seed
    assert (made.finetune is not None) == (made.adapter is not None) == (cell.training is not None)


def test_rates_are_searched_for_every_arm_as_its_cell_trains_but_for_text_that_judges(tmp_path: Path) -> None:
    given = argparse.Namespace(only=list(ARMS), budgets=[3, 16], bits=3, model=tmp_path)
    given.calibration = given.valid = given.training = tmp_path / "text.jsonl"
    found = list(searches(given))
    cells = {cell.arm: cell for cell in finetuning_cells() if cell.bits == 3}
    assert {(arm, rate) for arm, rate, _ in found} == {(arm, rate) for arm in cells for rate in RATES}
    for arm, rate, cell in found:
        made, measured = order(cell, given).request, order(cells[arm], given).request
        assert made.finetune is not None
        assert measured.finetune is not None
        assert made.finetune.learning_rate == rate
        assert made.finetune.validation_share == VALIDATION_SHARE
        assert measured.finetune.learning_rate in RATES
        same = {"learning_rate": rate, "validation_share": VALIDATION_SHARE}
        assert made == measured.model_copy(update={"finetune": measured.finetune.model_copy(update=same)})


@pytest.mark.parametrize("budget", [3, 16])
def test_arms_of_a_budget_train_as_many_parameters(budget: int) -> None:
    """Within 5 % of the LoRA's, over the linears of a SmolLM2 block; QA-HiRA can only meet the small budget."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    counts = {}
    for name, arm in ARMS.items():
        if budget in arm.ranks and arm.kind != "bayesian-lora":
            spec = ADAPTERS[arm.kind].spec(rank=arm.ranks[budget])
            counts[name] = sum(shape_for(spec, *shape, GROUP_SIZE).parameters for shape in shapes)
    assert ("qa-hira" in counts) == (budget == 3)
    assert all(abs(count / counts["qlora"] - 1) < 0.05 for count in counts.values()), counts
    assert ARMS["bayesian-lora"].ranks == ARMS["qlora"].ranks, "the same pair, with a few gates"


def test_the_table_of_finetuning_shows_losses_before_and_after_the_merge() -> None:
    cells = [Cell("a, rank 3", 2, seed, {}) for seed in (0, 1)]
    figures = {"loss": 2.5, "merged": 3.25, "parameters": 1000, "tokens_per_second": 5000, "seconds": 20, "peak_gib": 2}
    found = [{"key": c.key, "held_out": 3.0 + c.seed / 5} | figures for c in cells]
    gated = Cell("c, rank 3", 2, 0, {}, training={"adapter": {"kind": "bayesian-lora"}})
    found.append({"key": gated.key, "held_out": 3.0, "bit_operations_saved": 0.771} | figures)
    made = finetuning_tables(found, [*cells, Cell("b, rank 3", 2, 0, {}), gated])
    losses, saved = made.split("Share of the adapter's bit operations")
    assert "| c, rank 3 | 77.1 % |" in saved
    assert "a, rank 3" not in saved
    assert "c, rank 3" in losses
    assert "| a, rank 3 | 3.1000 ± 0.100, merged 3.2500 ± 0.000 |" in made
    assert "| a, rank 3 | 1,000, 20 s, 5,000, 2.0 GiB |" in made
    assert "| b, rank 3 | missing |" in made


def test_measured_cells_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert list(missing(file, CELLS)) == CELLS
    file.write_text(json.dumps(line(CELLS[1], 0.5)) + "\n")
    assert list(missing(file, CELLS)) == [CELLS[0], *CELLS[2:]]


@pytest.mark.parametrize("count", [1, 3, 200])
def test_processes_share_the_cells_and_none_splits_those_of_a_base(count: int) -> None:
    parts = [share(CELLS, index, count) for index in range(count)]
    assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in CELLS)
    trained = [{(c.bits, c.seed) for c in part if c.arm.startswith("qa-lora")} for part in parts]
    for one, other in itertools.combinations(trained, 2):
        assert not one & other


def test_the_table_shows_means_spread_and_what_is_missing() -> None:
    learned = [Cell("a", 2, seed, {}) for seed in (0, 1, 2)]
    made = tables([line(learned[0], 0.5), line(learned[2], 0.7)], [*learned, Cell("b", 2, 0, {}), Cell("b", 4, 0, {})])
    assert "| a |  | 0.6000 ± 0.100 (30.00, 2 of 3 seeds) |" in made
    assert "| b | missing | missing |" in made
    assert "| a |  | 3 s on a CPU, 1.5 GiB, 4.250 |" in made


def test_the_file_holds_known_cells_once() -> None:
    found = [measured["key"] for measured in lines()]
    assert len(set(found)) == len(found)
    assert set(found) <= {cell.key for cell in CELLS}
