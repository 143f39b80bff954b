"""Tables in Markdown of what was measured: KL(original || file), perplexity and the likeliest tokens that stay."""

import math
from collections.abc import Iterable, Mapping
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
    ours, theirs = np.array(told["kl"]), np.array(baseline["kl"])
    ratio, count = ours.sum() / theirs.sum(), len(ours)
    if count < 2:
        return f"{ratio - 1:+.1%}"
    without = (ours.sum() - ours) / (theirs.sum() - theirs)
    error = math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return f"{ratio - 1:+.1%} ± {error:.1%}"


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
