"""Parts of a report's page: figures that name their place in report.json, tables, sections."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.report_page.charts import Bars, Heatmap, Plot, Stack

Chart = Bars | Heatmap | Plot | Stack


@dataclass(frozen=True)
class Figure:
    """A number of report.json.

    at      its place, a JSON pointer (RFC 6901)
    value   the number as report.json has it
    text    the number for people
    """

    at: str
    value: str
    text: str


Item = Figure | str


@dataclass(frozen=True)
class Table:
    """Rows under a head. With `pairs` the first item of each row is its head; folded tables open on demand."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Item, ...], ...]
    pairs: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Side:
    """A text beside another one."""

    name: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it: paragraphs, charts, tables, lines of code, texts side by side."""

    name: str
    title: str
    paragraphs: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    code: tuple[tuple[bool, str], ...] = ()
    """(whether it is code, the text), in order."""
    beside: tuple[tuple[Side, ...], ...] = ()


class Figures:
    """The numbers of a report, looked up by their place."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def at(self, pointer: str, form: str = "g", unit: str = "") -> Figure:
        """The number at a JSON pointer.

        form   `bytes`, `seconds`, `percent`, or a format specification of Python's

        Raises:
            LookupError: there is nothing.
        """
        value = self._value(pointer)
        return Figure(pointer, json.dumps(value), in_words(value, form) + unit)

    def maybe(self, pointer: str, form: str = "g", unit: str = "") -> Item:
        """The same; a dash where report.json has null."""
        return "–" if self._value(pointer) is None else self.at(pointer, form, unit)

    def _value(self, pointer: str) -> Any:
        value: Any = self._document
        for token in pointer.split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            value = value[int(key)] if isinstance(value, Sequence) else value[key]
        return value


def token(name: str) -> str:
    """A key as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def in_words(value: float, form: str) -> str:
    """A number for people: `bytes` in decimal units, `seconds` as a duration, `percent` of one."""
    if form == "bytes":
        return bytes_in_words(value)
    if form == "seconds":
        return seconds_in_words(value)
    if form == "percent":
        return f"{100 * value:.2f} %"
    return format(value, form)


def bytes_in_words(count: float) -> str:
    """3 significant digits in decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds_in_words(seconds: float) -> str:
    """ "0.04 s", "4.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
