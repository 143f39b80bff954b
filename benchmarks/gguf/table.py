"""Tables in Markdown of what was measured: KL(original || file), perplexity and the likeliest tokens that stay.

python -m benchmarks.gguf.table rows.jsonl          # of runs that were cut short, too
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf.rows import IMATRIX

HEADER = (
    "| | file | MB | KL divergence | against llama.cpp, imatrix | perplexity | top-1 | seconds |\n" + "| --- " * 8 + "|"
)


def row_of(told: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    """A row; `baseline` is llama.cpp's file with an imatrix, of the same subject and seed."""
    head = f"| {told['subject']} | {told['name']} |"
    if "error" in told:
        return f"{head} {str(told['error'])[:300]} |"
    tokens = told["tokens"]
    seconds = f"{told['seconds']:.1f}" if "seconds" in told else ""
    return (
        f"{head} {told['bytes'] / 1e6:.2f} | {sum(told['kl']) / tokens:.4f} | {_against(told, baseline)} | "
        f"{math.exp(sum(told['nll']) / tokens):.3f} | {sum(told['same']) / tokens:.1%} | {seconds} |"
    )


def _against(told: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    """How far the divergence is from the baseline's, with the standard error over sequences (jackknife)."""
    if baseline is None or "error" in baseline or told["name"] == IMATRIX:
        return ""
    change, error = change_of(told["kl"], baseline["kl"])
    return f"{change:+.1%} ± {error:.1%}"


def change_of(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """The sum of `ours` over that of `theirs`, less 1, and its standard error if each place is drawn by itself."""
    mine, other, count = np.array(ours), np.array(theirs), len(ours)
    change = float(mine.sum() / other.sum() - 1)
    if count < 2:
        return change, math.nan
    without = (mine.sum() - mine) / (other.sum() - other)
    return change, math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())


def baseline_of(told: Mapping[str, Any], all_rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """llama.cpp's row with an imatrix that a row is compared with."""
    key = ("model", "table", "subject", "seed")
    return next((r for r in all_rows if r["name"] == IMATRIX and all(r.get(k) == told.get(k) for k in key)), None)


def tables(all_rows: list[dict[str, Any]]) -> str:
    """Every table, rows by subject and in the order of a plan."""
    parts = list[str]()
    for model, table in dict.fromkeys((row["model"], row["table"]) for row in all_rows):
        chosen = [row for row in all_rows if (row["model"], row["table"]) == (model, table)]
        subjects = list(dict.fromkeys(row["subject"] for row in chosen))
        chosen.sort(key=lambda row: (subjects.index(row["subject"]), row["seed"], row["place"]))
        parts.append(
            f"\n{model}, {table}\n\n{HEADER}\n" + "\n".join(row_of(r, baseline_of(r, all_rows)) for r in chosen)
        )
    return "\n".join(parts)


def over_seeds(all_rows: list[dict[str, Any]]) -> str:
    """Means over seeds with their standard deviations, where a row has several; each against its own baseline."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in all_rows:
        if "error" not in row:
            groups.setdefault((row["model"], row["table"], row["subject"], row["name"]), []).append(row)
    lines = list[str]()
    for (model, table, subject, name), rows in groups.items():
        if len(rows) < 2:
            continue
        divergences = np.array([sum(row["kl"]) / row["tokens"] for row in rows])
        bases = [baseline_of(row, all_rows) for row in rows]
        changes = np.array([change_of(row["kl"], base["kl"])[0] for row, base in zip(rows, bases, strict=True) if base])
        mean = f"{divergences.mean():.4f} ± {divergences.std(ddof=1):.4f}"
        against = f"{changes.mean():+.1%} ± {changes.std(ddof=1):.1%}" if name != IMATRIX and len(changes) > 1 else ""
        lines.append(f"| {model}, {table} | {subject} | {name} | {len(rows)} | {mean} | {against} |")
    header = "\n| | | file | seeds | KL divergence | against llama.cpp, imatrix |\n" + "| --- " * 6 + "|"
    return "\n".join([header, *lines]) if lines else ""


def main(*files: str) -> None:
    """Print the tables of rows that runs have written; of a row that several have, the last."""
    keys = ("model", "table", "subject", "name", "seed")
    found = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    known = {tuple(row[key] for key in keys): row for row in found}
    print(tables([*known.values()]), over_seeds([*known.values()]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
