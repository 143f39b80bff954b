"""The card's section on a goal, from a report alone."""

from bitwright.frontier import FrontierPoint
from bitwright.report import GoalReport, TextReport
from tests.reports import report
from workers.formats.cards.goal import goal

POINTS = tuple(
    FrontierPoint(bytes=10_000_000 * n, bits_per_weight=2 + n / 4, error=1 / n, kl_predicted=0.5 / n)
    for n in range(1, 11)
)
TEXT = TextReport(source="builtin", sha256="0" * 64, num_samples=4, sequence_length=64, tokens=256)
FOUND = GoalReport(
    **{"goal": "kl", "limit": 0.1, "text": TEXT, "frontier": POINTS, "chosen": 5, "rounds": 3, "met": True},
    **{"next_smaller_misses": True, "seconds": 1.0},
)


def test_there_is_none_without_a_goal() -> None:
    assert goal(report()) == []


def test_a_distance_is_told_with_its_neighbours() -> None:
    text = "\n".join(goal(report().model_copy(update={"goal": FOUND})))
    assert "At most 0.1 nats a token" in text
    assert "the smallest of the sizes looked at that keeps it" in text
    assert "| this | 60 MB | 3.500 | 0.0833 |" in text
    assert "| 30 MB |" in text
    assert "| 20 MB |" not in text
    assert "256 tokens" in text
    assert "quantized 3 times" in text


def test_a_goal_that_is_missed_says_so() -> None:
    missed = FOUND.model_copy(update={"met": False, "next_smaller_misses": None})
    assert "which misses it" in goal(report().model_copy(update={"goal": missed}))[1]


def test_memory_is_told_with_its_cache() -> None:
    memory = {"goal": "memory", "limit": 24e9, "weight_limit": 20_000_000_000, "cache_bytes": 1_800_000_000}
    text = goal(report().model_copy(update={"goal": FOUND.model_copy(update=memory)}))[1]
    assert all(size in text for size in ("24 GB", "1.8 GB", "20 GB"))
