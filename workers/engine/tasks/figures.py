"""Figures of a task from the scores of its rows, with standard errors of each and of the difference of two models.

A figure is a mean of scores x, or a function of a ratio r = sum(x) / sum(w) such as word perplexity exp(-r). With the
influence of row i, u_i = x_i - mean(x) or f'(r) (x_i - r w_i) / mean(w), the standard error of a figure over n rows is
sqrt(sum(u^2) / (n - 1) / n), and that of a difference has the rows' differences of influences in place of u: the same
rows are asked of both models. For means it is lm-eval's `stderr`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.measured.tasks import TaskFigure

Scores = Sequence[float]
"""One for each row."""


@dataclass(frozen=True)
class Estimate:
    """A figure of one model, and the influence of each row on it."""

    value: float
    influence: tuple[float, ...]


def mean(scores: Scores) -> Estimate:
    """The mean of scores."""
    middle = math.fsum(scores) / len(scores)
    return Estimate(middle, tuple(score - middle for score in scores))


def perplexity(log_likelihoods: Scores, sizes: Scores) -> Estimate:
    """exp(-sum(l) / sum(w)), w the words or bytes of a text."""
    return _ratio(log_likelihoods, sizes, lambda r: math.exp(min(-r, 700.0)), lambda r: -math.exp(min(-r, 700.0)))


def bits(log_likelihoods: Scores, sizes: Scores) -> Estimate:
    """-sum(l) / sum(w) / log(2), w the bytes of a text."""
    return _ratio(log_likelihoods, sizes, lambda r: -r / math.log(2), lambda _: -1 / math.log(2))


def _ratio(x: Scores, w: Scores, f: Callable[[float], float], slope: Callable[[float], float]) -> Estimate:
    ratio, usual = math.fsum(x) / math.fsum(w), math.fsum(w) / len(w)
    factor = slope(ratio) / usual
    return Estimate(f(ratio), tuple(factor * (each - ratio * size) for each, size in zip(x, w, strict=True)))


def stderr(influence: Scores) -> float | None:
    """The standard error of a figure; None of one row."""
    n = len(influence)
    return None if n < 2 else math.sqrt(math.fsum(u * u for u in influence) / (n - 1) / n)


def figure(name: str, higher_is_better: bool, original: Estimate | None, result: Estimate) -> TaskFigure:
    """A task's figure of both models; `original` None where it compares with the original."""
    apart = None if original is None else [b - a for a, b in zip(original.influence, result.influence, strict=True)]
    return TaskFigure(
        name=name,
        higher_is_better=higher_is_better,
        original=None if original is None else original.value,
        original_stderr=None if original is None else stderr(original.influence),
        value=result.value,
        stderr=stderr(result.influence),
        difference_stderr=None if apart is None else stderr(apart),
        rows=len(result.influence),
    )
