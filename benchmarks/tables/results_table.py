"""The tables that docs/results.md shows of the measured cells; a cell that was not measured is shown as missing."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.tables.cells import Cell, cells

FILE = Path(__file__).with_name("results.jsonl")
MISSING = "missing"
Line = dict[str, Any]
Rows = dict[str, dict[float, list[Line | None]]]
"""A row's cells by column, one for each seed; None for what was not measured."""


def lines(file: Path = FILE) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tables(measured: Sequence[Line], wanted: Iterable[Cell]) -> str:
    """One table of KL and perplexity by row and width, and one of time and memory."""
    arms, widths = by_row(measured, wanted)
    header = ["method", *(f"{bits:g} bits" for bits in widths)]
    quality = [[arm, *(_quality(columns.get(bits)) for bits in widths)] for arm, columns in arms.items()]
    cost = [[arm, *(_cost(columns.get(bits)) for bits in widths)] for arm, columns in arms.items()]
    texts = [
        _originals(measured),
        "KL divergence (perplexity); the mean of the seeds where there are several, with their spread:",
        table(header, quality),
        "Seconds, peak memory and bits per weight, adapters included:",
        table(header, cost),
    ]
    return "\n\n".join(texts)


def by_row(measured: Sequence[Line], wanted: Iterable[Cell]) -> tuple[Rows, list[float]]:
    """The lines of the wanted cells by row and column, and the columns, widest first."""
    by_key = {line["key"]: line for line in measured}
    rows: Rows = {}
    for cell in wanted:
        rows.setdefault(cell.arm, {}).setdefault(cell.bits, []).append(by_key.get(cell.key))
    return rows, sorted({bits for columns in rows.values() for bits in columns}, reverse=True)


def _originals(measured: Sequence[Line]) -> str:
    if not measured:
        return "Nothing was measured yet."
    original = sorted({f"{line['perplexity_original']:.3f}" for line in measured})
    return f"{len(measured)} cells are measured. Perplexity of the original: {', '.join(original)}."


def _quality(given: list[Line | None] | None) -> str:
    if given is None:
        return ""
    known = [line for line in given if line is not None]
    if not known:
        return MISSING
    kl = [line["kl"] for line in known]
    seeds = f", {len(known)} of {len(given)} seeds" if len(known) < len(given) else ""
    return f"{fmean(kl):.4f}{spread(kl)} ({fmean(line['perplexity'] for line in known):.2f}{seeds})"


def _cost(given: list[Line | None] | None) -> str:
    if given is None:
        return ""
    known = [line for line in given if line is not None]
    if not known:
        return MISSING
    seconds, memory = fmean(line["seconds"] for line in known), max(line["peak_gib"] for line in known)
    place = " on a CPU" if any(line["device"] == "cpu" for line in known) else ""
    return f"{seconds:.0f} s{place}, {memory:.1f} GiB, {known[0]['bits_per_weight']:.3f}"


def spread(values: Sequence[float]) -> str:
    """Half of what lies between the least and the largest."""
    return f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def results() -> str:
    """All tables of the file."""
    return tables(lines(), cells())
