"""Reports side by side: settings and figures as rows, which result is best in each, and which no other one beats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from bitwright.cli.render import format_bytes, format_seconds
from bitwright.measured.noise import within_noise
from bitwright.report import Report


@dataclass(frozen=True)
class Compared:
    """A result by its name: a job's id, or a path."""

    name: str
    report: Report


@dataclass(frozen=True)
class Row:
    """A setting or a figure of every result, "" where one has none.

    best      index of the best one; None where nothing is better, or all are the same
    differs   whether the results differ in it
    """

    name: str
    texts: tuple[str, ...]
    best: int | None
    differs: bool


@dataclass(frozen=True)
class Axis:
    """A figure: where it is in a report, how it is written, and which way is better (None: neither)."""

    name: str
    value: Callable[[Report], float | None]
    text: Callable[[float], str]
    lower: bool | None = True


def _quality(name: str) -> Callable[[Report], float | None]:
    """A figure of the quality."""
    return lambda report: None if report.quality is None else getattr(report.quality, name)


def _loss_after(report: Report) -> float | None:
    return None if report.finetuning is None else report.finetuning.loss_after


def _reference(report: Report) -> float | None:
    return None if report.round_to_nearest is None else report.round_to_nearest.kl_divergence


SETTINGS: tuple[tuple[str, Callable[[Report], str | None]], ...] = (
    ("model", lambda report: report.model.source),
    ("revision", lambda report: report.model.revision),
    ("method", lambda report: report.method),
    ("scheme", lambda report: report.scheme),
    ("adapter", lambda report: None if report.adapter is None else report.adapter.kind),
    ("calibration", lambda report: None if report.calibration is None else _text_of(report)),
    ("seed", lambda report: str(report.seed)),
    ("device", lambda report: str(report.plan.get("device") or report.device)),
    ("Bitwright", lambda report: report.version),
)
FIGURES = (
    Axis("size of the original", lambda report: report.size.bytes_original, format_bytes, None),
    Axis("size", lambda report: report.size.bytes_quantized, format_bytes),
    Axis("bits per weight, whole model", lambda report: report.size.bits_per_weight_model, "{:.3f}".format),
    Axis("bits per weight, quantized linears", lambda report: report.size.bits_per_weight, "{:.3f}".format),
    Axis("perplexity of the original", _quality("perplexity_original"), "{:.3f}".format, None),
    Axis("perplexity", _quality("perplexity"), "{:.3f}".format),
    Axis("KL to the original", _quality("kl_divergence"), "{:.5f}".format),
    Axis("same most likely token", _quality("top1_agreement"), "{:.2%}".format, lower=False),
    Axis("KL of round to nearest", _reference, "{:.5f}".format, None),
    Axis("held-out loss after training", _loss_after, "{:.4f}".format),
    Axis("time", lambda report: report.seconds.get("total"), format_seconds),
    Axis("time to quantize", lambda report: report.seconds.get("quantize"), format_seconds),
    Axis("peak host memory", lambda report: report.peak_memory.host_bytes, format_bytes),
    Axis("peak device memory", lambda report: report.peak_memory.device_bytes, format_bytes),
)


def settings_rows(results: Sequence[Compared]) -> list[Row]:
    """Rows of settings, without what no result has."""
    rows = []
    for name, value in SETTINGS:
        texts = tuple(value(result.report) or "" for result in results)
        rows.append(Row(name, texts, None, len(set(texts)) > 1))
    return [row for row in rows if any(row.texts)]


def figure_rows(results: Sequence[Compared]) -> list[Row]:
    """Rows of figures, and the bytes of weight files by format; without what no result has."""
    formats = dict.fromkeys(name for result in results for name in result.report.size.bytes_files)
    files = [Axis(f"weight files of {name}", _files_of(name), format_bytes) for name in formats]
    head, rest = FIGURES[:2], FIGURES[2:]
    rows = [_figure_row(axis, results) for axis in (*head, *files, *rest, *_task_axes(results))]
    return [row for row in rows if any(row.texts)]


def doubts(results: Sequence[Compared]) -> list[str]:
    """Reasons why figures of these results should not be held against each other."""
    found = []
    texts = {result.report.quality.text.sha256 for result in results if result.report.quality is not None}
    if len(texts) > 1:
        found.append("quality was measured on different texts: compare each with its own original")
    if any(result.report.quality is None for result in results):
        found.append("not all were evaluated")
    found += _alike(results)
    if len({result.report.model.source for result in results}) > 1:
        found.append("the results are of different models")
    if len({str(result.report.plan.get("device") or result.report.device) for result in results}) > 1:
        found.append("times are of different devices")
    return found


def _alike(results: Sequence[Compared]) -> list[str]:
    """Pairs of results whose distances differ by no more than the noise of the text."""
    measured = [(result.name, result.report.quality) for result in results]
    found = []
    for (one, first), (other, second) in combinations(measured, 2):
        if first is None or second is None or first.text.sha256 != second.text.sha256:
            continue
        errors = [None if each.noise is None else each.noise.kl_divergence for each in (first, second)]
        noise = None if None in errors else max(error or 0.0 for error in errors)
        if within_noise(first.kl_divergence - second.kl_divergence, noise):
            found.append(f"KL of {one} and {other} differs by no more than noise")
    return found


def _task_axes(results: Sequence[Compared]) -> list[Axis]:
    """An axis for each figure of each task that a result has."""
    known = {
        (task.name, figure.name): not figure.higher_is_better
        for result in results
        for task in result.report.tasks
        for figure in task.figures
    }
    return [
        Axis(f"{task}: {name}", partial(_task_figure, task, name), "{:.4f}".format, lower)
        for (task, name), lower in known.items()
    ]


def _task_figure(task: str, name: str, report: Report) -> float | None:
    figures = (each.figure(name) for each in report.tasks if each.name == task)
    return next((figure.value for figure in figures if figure is not None), None)


def unbeaten(points: Sequence[tuple[float, float] | None]) -> list[int]:
    """Indices of the points with nothing at most as large in both coordinates and smaller in one, by the first one."""
    known = [(point, index) for index, point in enumerate(points) if point is not None]
    front = [
        (point, index)
        for point, index in known
        if not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other, _ in known)
    ]
    return [index for _, index in sorted(front)]


def size_and_distance(report: Report) -> tuple[float, float] | None:
    """(bytes, KL to the original); None without an evaluation."""
    return None if report.quality is None else (report.size.bytes_quantized, report.quality.kl_divergence)


def _figure_row(axis: Axis, results: Sequence[Compared]) -> Row:
    values = [axis.value(result.report) for result in results]
    texts = tuple("" if value is None else axis.text(value) for value in values)
    known = [value for value in values if value is not None]
    best = None
    if axis.lower is not None and len(set(known)) > 1:
        best = values.index(min(known) if axis.lower else max(known))
    return Row(axis.name, texts, best, len(set(texts)) > 1)


def _files_of(name: str) -> Callable[[Report], float | None]:
    return lambda report: report.size.bytes_files.get(name)


def _text_of(report: Report) -> str | None:
    text = report.calibration
    return None if text is None else f"{text.num_samples} × {text.sequence_length} of {text.source}"
