"""The tables that docs/results.md shows of the measured cells; a cell that was not measured is shown as missing."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cells import Cell, cells

FILE = Path(__file__).with_name("results.jsonl")
MISSING = "missing"
Line = dict[str, Any]


def lines(file: Path = FILE) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tables(found: Sequence[Line], wanted: Iterable[Cell]) -> str:
    """One table of KL and perplexity by row and width, and one of time and memory."""
    by_key = {line["key"]: line for line in found}
    arms: dict[str, dict[float, list[Line | None]]] = {}
    for cell in wanted:
        arms.setdefault(cell.arm, {}).setdefault(cell.bits, []).append(by_key.get(cell.key))
    widths = sorted({bits for columns in arms.values() for bits in columns}, reverse=True)
    header = ["method", *(f"{bits:g} bits" for bits in widths)]
    quality = [[arm, *(_quality(columns.get(bits)) for bits in widths)] for arm, columns in arms.items()]
    cost = [[arm, *(_cost(columns.get(bits)) for bits in widths)] for arm, columns in arms.items()]
    texts = [
        _originals(found),
        "KL divergence (perplexity); the mean of the seeds where there are several, with their spread:",
        _table(header, quality),
        "Seconds, peak memory and bits per weight, adapters included:",
        _table(header, cost),
    ]
    return "\n\n".join(texts)


def _originals(found: Sequence[Line]) -> str:
    if not found:
        return "Nothing was measured yet."
    original = sorted({f"{line['perplexity_original']:.3f}" for line in found})
    return f"{len(found)} cells are measured. Perplexity of the original: {', '.join(original)}."


def _quality(given: list[Line | None] | None) -> str:
    if given is None:
        return ""
    found = [line for line in given if line is not None]
    if not found:
        return MISSING
    kl = [line["kl"] for line in found]
    spread = f" ± {(max(kl) - min(kl)) / 2:.3f}" if len(kl) > 1 else ""
    seeds = f", {len(found)} of {len(given)} seeds" if len(found) < len(given) else ""
    return f"{fmean(kl):.4f}{spread} ({fmean(line['perplexity'] for line in found):.2f}{seeds})"


def _cost(given: list[Line | None] | None) -> str:
    if given is None:
        return ""
    found = [line for line in given if line is not None]
    if not found:
        return MISSING
    seconds, memory = fmean(line["seconds"] for line in found), max(line["peak_gib"] for line in found)
    place = " on a CPU" if any(line["device"] == "cpu" for line in found) else ""
    return f"{seconds:.0f} s{place}, {memory:.1f} GiB, {found[0]['bits_per_weight']:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def results() -> str:
    """All tables of the file."""
    return tables(lines(), cells())
