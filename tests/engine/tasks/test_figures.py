"""Standard errors of tasks' figures against a bootstrap over rows, and figures against their definitions."""

import math

import numpy as np
import pytest

from workers.engine.tasks.asking import windows
from workers.engine.tasks.figures import bits, figure, mean, perplexity, stderr


def test_a_mean_has_the_standard_error_of_a_mean() -> None:
    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(scores).value == 0.6
    assert stderr(mean(scores).influence) == pytest.approx(np.std(scores, ddof=1) / math.sqrt(5))
    assert stderr(mean([1.0]).influence) is None


@pytest.mark.parametrize("make", [perplexity, bits])
def test_a_ratio_has_the_standard_error_that_a_bootstrap_finds(make: object) -> None:
    assert callable(make)
    draw = np.random.default_rng(0)
    words = draw.integers(20, 200, 300).astype(float)
    first = -words * draw.normal(3.0, 0.4, 300)
    second = first - words * draw.normal(0.05, 0.02, 300)
    one, two = make(first, words), make(second, words)
    chosen = [draw.integers(0, 300, 300) for _ in range(400)]
    alone = [make(first[rows], words[rows]).value for rows in chosen]
    apart = [make(second[rows], words[rows]).value - make(first[rows], words[rows]).value for rows in chosen]
    made = figure("x", False, one, two)
    assert made.original_stderr == pytest.approx(np.std(alone), rel=0.2)
    assert made.difference_stderr == pytest.approx(np.std(apart), rel=0.2)
    apart_from, alone_from = made.difference_stderr, made.original_stderr
    assert apart_from is not None
    assert alone_from is not None
    assert apart_from < 0.5 * alone_from  # the same rows: most of the noise is of both
    assert not made.is_noise


def test_windows_predict_every_token_once() -> None:
    text = tuple(range(100, 110))
    found = list(windows(text, 1, 4))
    assert found == [((1,), text[:4]), ((103,), text[4:8]), ((105, 106, 107), text[8:])]
