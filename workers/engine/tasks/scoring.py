"""Scores of a task's rows by one model, and the task's figures from those of two.

Multiple choice: the choice of the largest log-likelihood (acc), of the largest for each character (acc_norm) or byte
(acc_bytes); the first among equals. Exact match: the greedy text, without whitespace around it, is the answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from app.domain.request.evaluation_tasks import EvaluationTask, TaskKind
from bitwright.measured.tasks import TaskFigure
from workers.disk.task_rows import AskedRow, AskedTask
from workers.engine.tasks.asking import Asked
from workers.engine.tasks.figures import Estimate, bits, figure, mean, perplexity
from workers.engine.tasks.turns import calls_in, is_valid, same_calls, tries_to_call

GREEDY = "same_tokens"
"""Tokens until the result's greedy text leaves the original's."""


@dataclass(frozen=True)
class Scored:
    """Outcome of a row: scores by name, None where the row says nothing of it; and the greedy text, if any."""

    scores: dict[str, float | None]
    written: tuple[int, ...] = ()


def scored(asked: Asked, task: EvaluationTask, rows: AskedTask, tick: Callable[[], None]) -> list[Scored]:
    """Every row of a task, asked of a model."""
    score = {
        TaskKind.MULTIPLE_CHOICE: _choose,
        TaskKind.EXACT_MATCH: _match,
        TaskKind.PERPLEXITY: _read,
        TaskKind.CHAT: _answer,
    }[task.kind]
    found = []
    for row in rows.rows:
        found.append(score(asked, task, rows, row))
        tick()
    return found


def _choose(asked: Asked, task: EvaluationTask, rows: AskedTask, row: AskedRow) -> Scored:  # noqa: ARG001
    likely = [asked.log_likelihood(each.context, each.tokens) for each in row.choices]
    by_character = [each / size for each, size in zip(likely, row.characters, strict=True)]
    by_byte = [each / size for each, size in zip(likely, row.bytes, strict=True)]
    chosen = {"acc": likely, "acc_norm": by_character, "acc_bytes": by_byte}
    return Scored({name: float(values.index(max(values)) == row.right) for name, values in chosen.items()})


def _match(asked: Asked, task: EvaluationTask, rows: AskedTask, row: AskedRow) -> Scored:
    written = asked.greedy(row, rows, task.max_new_tokens)
    return Scored({"exact_match": float(asked.words(written, rows).strip() == row.answer)}, written)


def _read(asked: Asked, task: EvaluationTask, rows: AskedTask, row: AskedRow) -> Scored:  # noqa: ARG001
    if rows.first is None:
        raise ValueError("a text has no token before it")
    return Scored({"log_likelihood": asked.text_log_likelihood(row, rows.first)})


def _answer(asked: Asked, task: EvaluationTask, rows: AskedTask, row: AskedRow) -> Scored:
    written = asked.greedy(row, rows, task.max_new_tokens)
    text = asked.words(written, rows)
    whole = str(asked.tokenizer.decode(list(written)))
    ended = bool(written) and (written[-1] in rows.ends or any(stop in whole for stop in rows.stops))
    calls = calls_in(whole) if row.tools else []
    wanted = bool(row.calls)
    valid = all(is_valid(call, row.tools) for call in calls) and (bool(calls) or not (wanted or tries_to_call(whole)))
    return Scored(
        {
            "well_formed": float(ended and bool(text.strip() or calls) and (valid or not row.tools)),
            "ended": float(ended),
            "calls_valid": float(valid) if row.tools else None,
            "calls_match": float(same_calls(calls, row.calls)) if row.tools and row.calls is not None else None,
        },
        written,
    )


def figures(
    task: EvaluationTask, rows: AskedTask, original: Sequence[Scored], result: Sequence[Scored]
) -> Iterator[TaskFigure]:
    """The figures of a task, of the rows that say something of each."""
    for name, higher in task.metrics.items():
        if name == GREEDY:
            same = [_same(one.written, other.written) for one, other in zip(original, result, strict=True)]
            yield figure(name, higher, None, mean(same))
            continue
        pair = [_estimate(name, rows, scores) for scores in (original, result)]
        if pair[1] is not None:
            yield figure(name, higher, pair[0], pair[1])


def _estimate(name: str, rows: AskedTask, scores: Sequence[Scored]) -> Estimate | None:
    if "log_likelihood" not in scores[0].scores:
        known = [value for each in scores if (value := each.scores[name]) is not None]
        return mean(known) if known else None
    likely = [each.scores["log_likelihood"] or 0.0 for each in scores]
    words, sizes = [float(row.words) for row in rows.rows], [float(row.bytes[0]) for row in rows.rows]
    if name == "bits_per_byte":
        return bits(likely, sizes)
    return perplexity(likely, words if name == "word_perplexity" else sizes)


def _same(one: Sequence[int], other: Sequence[int]) -> float:
    """Tokens from the first on that two texts share."""
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
