"""Geometry of a report's charts: positions in the units of an SVG's viewBox, labels as text.

Nothing here writes markup: the template draws what these values say, and escapes every label.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH = 720.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 24.0, 44.0
PLOT_HEIGHT = 240.0
HEIGHTS = {"plot": TOP + PLOT_HEIGHT + BOTTOM, "bar": 26.0, "stack": 34.0}
"""Units that a plot, each bar and a stack take from top to bottom."""
LEVELS = 9
"""Shades of a heatmap, the first for the least."""
TICKS = 5
LABEL_EVERY = 26.0
"""Units between two labels of columns, at the least."""
LETTERS_FIT = 14.0
"""Units of a cell from which on two digits fit in."""
CHARACTER = 6.6
"""Units of a label's character."""
LONGEST_LABEL = 26


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heatmap. `shade` counts from 0; `text` stands in it, `hint` beside the pointer."""

    x: float
    y: float
    shade: int
    text: str
    hint: str


@dataclass(frozen=True)
class Heatmap:
    """Values by row and column; `least` and `most` are what the first and the last shade stand for."""

    label: str
    height: float
    cell_width: float
    cell_height: float
    cells: tuple[Cell, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    left: float
    axis: str
    least: str
    most: str


@dataclass(frozen=True)
class Line:
    """A series: the path through its points, and the points where they are few enough to be drawn."""

    name: str
    path: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """Lines over two axes."""

    label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: its share of the longest one, and what is written beside it."""

    name: str
    text: str
    length: float


@dataclass(frozen=True)
class Bars:
    """Bars from the top down."""

    label: str
    bars: tuple[Bar, ...]
    left: float


@dataclass(frozen=True)
class Share:
    """A piece of a whole: where it begins, how long it is, in units."""

    name: str
    text: str
    x: float
    width: float


@dataclass(frozen=True)
class Stack:
    """Pieces of one bar."""

    label: str
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Series:
    """Points of a line, by name; x rises."""

    name: str
    points: Sequence[tuple[float, float]]


Values = Mapping[tuple[str, str], float]
"""By row and column."""


def heatmap(
    label: str, rows: Sequence[str], columns: Sequence[str], values: Values, hints: Mapping[tuple[str, str], str]
) -> Heatmap:
    """Values, all above 0, in shades of their logarithm.

    rows, columns   names, in order
    hints           the words beside the pointer, by row and column
    """
    left = label_width(rows)
    width = (WIDTH - left - RIGHT) / max(1, len(columns))
    height = min(22.0, max(12.0, width))
    scale = _shades(list(values.values()))
    cells = tuple(
        Cell(round(left + x * width, 2), y * height, scale(value), "", hints.get((row, column), ""))
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
        if (value := values.get((row, column))) is not None
    )
    return Heatmap(
        label=label,
        height=len(rows) * height + 40,
        cell_width=round(width, 2),
        cell_height=height,
        cells=cells,
        rows=tuple(Tick((y + 0.5) * height, shortened(row)) for y, row in enumerate(rows)),
        columns=_column_ticks(columns, left, width),
        left=left,
        axis="block",
        least=figure_text(min(values.values(), default=0.0)),
        most=figure_text(max(values.values(), default=0.0)),
    )


def width_map(label: str, rows: Sequence[str], columns: Sequence[str], widths: Values) -> Heatmap:
    """Numbers of bits, each written in its cell where it fits, in as many shades as there are widths."""
    plain = heatmap(label, rows, columns, widths, {})
    order = sorted(set(widths.values()))
    shade = {
        width: 0 if len(order) == 1 else round((LEVELS - 1) * n / (len(order) - 1)) for n, width in enumerate(order)
    }
    fits = plain.cell_width >= LETTERS_FIT
    present = [widths[row, column] for row in rows for column in columns if (row, column) in widths]
    cells = tuple(
        Cell(cell.x, cell.y, shade[width], f"{width:g}" if fits else "", "")
        for cell, width in zip(plain.cells, present, strict=True)
    )
    return Heatmap(**{**vars(plain), "cells": cells})


def plot(label: str, series: Sequence[Series], x_title: str, y_title: str) -> Plot:
    """Lines over linear x and, where all values are above 0 and far apart, logarithmic y."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points if math.isfinite(y)]
    logarithmic = bool(ys) and min(ys) > 0 and max(ys) > 20 * min(ys)
    to_x, x_ticks = _axis(xs, LEFT, WIDTH - RIGHT, logarithmic=False, whole=True)
    to_y, y_ticks = _axis(ys, TOP + PLOT_HEIGHT, TOP, logarithmic=logarithmic)
    lines = []
    for one in series:
        points = tuple((round(to_x(x), 1), round(to_y(y), 1)) for x, y in one.points if math.isfinite(y))
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""
        lines.append(Line(one.name, path, points if len(points) <= 60 else ()))
    title = f"{y_title}, logarithmic" if logarithmic else y_title
    return Plot(label, tuple(lines), x_ticks, y_ticks, x_title, title)


def bars(label: str, values: Sequence[tuple[str, float, str]]) -> Bars:
    """Bars of (name, value, text)."""
    longest = max((value for _, value, _ in values), default=0.0) or 1.0
    left = label_width([name for name, _, _ in values])
    room = WIDTH - left - 110
    return Bars(label, tuple(Bar(shortened(n), text, round(room * v / longest, 1)) for n, v, text in values), left)


def stack(label: str, values: Sequence[tuple[str, float, str]]) -> Stack:
    """Pieces of (name, value, text), side by side in one bar."""
    whole = sum(value for _, value, _ in values) or 1.0
    shares, x = [], 0.0
    for name, value, text in values:
        width = WIDTH * value / whole
        shares.append(Share(name, text, round(x, 1), round(width, 1)))
        x += width
    return Stack(label, tuple(shares))


def figure_text(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def shortened(name: str) -> str:
    """A label of at most `LONGEST_LABEL` characters: of longer ones the end."""
    return name if len(name) <= LONGEST_LABEL else "…" + name[1 - LONGEST_LABEL :]


def label_width(names: Sequence[str]) -> float:
    """Units that the longest of these labels takes, and some room."""
    return min(LONGEST_LABEL, max(map(len, names), default=0)) * CHARACTER + 14


def _column_ticks(columns: Sequence[str], left: float, width: float) -> tuple[Tick, ...]:
    every = max(1, math.ceil(LABEL_EVERY / width))
    return tuple(Tick(round(left + (x + 0.5) * width, 1), name) for x, name in enumerate(columns) if x % every == 0)


def _shades(values: Sequence[float]) -> Callable[[float], int]:
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 0.0)

    def shade(value: float) -> int:
        if value <= 0 or high <= low:
            return 0
        share = (math.log(value) - low) / (high - low) if math.isfinite(value) else 1.0
        return min(LEVELS - 1, int(share * LEVELS))

    return shade


def _axis(
    values: Sequence[float], start: float, end: float, *, logarithmic: bool, whole: bool = False
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """Places of values between `start` and `end`, and marks at round ones."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - (0 if logarithmic else margin), high + margin
    first, last = (math.log(low), math.log(high)) if logarithmic else (low, high)

    def place(value: float) -> float:
        share = ((math.log(value) if logarithmic else value) - first) / (last - first)
        return start + share * (end - start)

    marks = _powers(low, high) if logarithmic else _round_marks(low, high, whole=whole)
    return place, tuple(Tick(round(place(mark), 1), f"{mark:g}") for mark in marks if low <= mark <= high)


def _round_marks(low: float, high: float, *, whole: bool) -> list[float]:
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, first + 4 * TICKS) if n * step <= high]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, with multiples of them where there would be few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 3, 5) if len(exponents) <= 3 else (1, 3) if len(exponents) <= 4 else (1,)
    return [factor * 10.0**exponent for exponent in exponents for factor in factors]
