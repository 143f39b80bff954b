"""The table of results: every cell is a request that the service takes, and what is missing is shown as missing."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.cells import Cell, cells
from benchmarks.results import missing, order
from benchmarks.results_table import lines, tables

CELLS = list(cells())
FIGURES = {"perplexity_original": 27.0, "peak_gib": 1.5, "device": "cpu", "bits_per_weight": 4.25, "seconds": 3.0}


def line(cell: Cell, kl: float) -> dict[str, object]:
    named = {"key": cell.key, "arm": cell.arm, "bits": cell.bits, "seed": cell.seed}
    return named | FIGURES | {"kl": kl, "perplexity": 30.0}


def test_keys_are_unique() -> None:
    keys = [cell.key for cell in CELLS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_every_cell_is_a_valid_request(cell: Cell, tmp_path: Path) -> None:
    given = argparse.Namespace(model=tmp_path, calibration=tmp_path / "a.jsonl", valid=tmp_path / "b.jsonl")
    made = order(cell, given).request
    assert made.quantization.model_dump()["method"] == cell.quantization["method"]
    assert made.seed == cell.seed


def test_measured_cells_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert list(missing(file, CELLS)) == CELLS
    file.write_text(json.dumps(line(CELLS[1], 0.5)) + "\n")
    assert list(missing(file, CELLS)) == [CELLS[0], *CELLS[2:]]


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
