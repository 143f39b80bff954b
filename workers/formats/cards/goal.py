"""The card's section on a goal that stood in place of bits: what was asked for, what was made, and what lies beside."""

from collections.abc import Iterator

from app.domain.methods.sizes import in_words
from bitwright.frontier import FrontierPoint
from bitwright.report import GoalReport, Report

NEIGHBOURS = 3
"""Points on each side of the one that was made that the card lists."""


def goal(report: Report) -> list[str]:
    """The section; empty where the request had no goal."""
    found = report.goal
    if found is None:
        return []
    return ["## Goal", _asked(found), "\n".join(_table(found)), _measured(found)]


def _asked(found: GoalReport) -> str:
    if found.goal == "kl":
        made = (
            "the smallest of the sizes looked at that keeps it" if found.next_smaller_misses else "a size that keeps it"
        )
        if not found.met:
            made = "the closest that was made, which misses it"
        return f"At most {found.limit:g} nats a token from the original were asked for; this is {made}."
    limit = in_words(found.weight_limit or 0)
    if found.goal == "memory":
        cache = in_words(found.cache_bytes or 0)
        asked = (
            f"{in_words(found.limit)} of memory, of which a KV cache takes {cache}: {limit} are left for the weights"
        )
        return f"The result was to fit {asked}; its choices are those with the least error in that size."
    return f"At most {limit} of weight files were asked for; the choices are those with the least error in that size."


def _table(found: GoalReport) -> Iterator[str]:
    yield "| | weight files, at most | bits per weight | KL predicted, rounded | KL measured |"
    yield "|---|---|---|---|---|"
    first = max(0, found.chosen - NEIGHBOURS)
    for index in range(first, min(len(found.frontier), found.chosen + NEIGHBOURS + 1)):
        yield _row(found.frontier[index], "this" if index == found.chosen else "")


def _row(point: FrontierPoint, mark: str) -> str:
    predicted = "" if point.kl_predicted is None else f"{point.kl_predicted:.3g}"
    known = [
        *([] if point.kl is None else [f"{point.kl:.3g}"]),
        *([] if point.kl_rounded is None else [f"{point.kl_rounded:.3g} rounded to nearest"]),
    ]
    return f"| {mark} | {in_words(point.bytes)} | {point.bits_per_weight:.3f} | {predicted} | {', '.join(known)} |"


def _measured(found: GoalReport) -> str:
    if found.text is None:
        return "No calibration text was left to measure on."
    made = f" The model was quantized {found.rounds} times on the way." if found.rounds > 1 else ""
    return f"KL in this table is of {found.text.tokens} tokens of the calibration text that were held out.{made}"
