"""report.html: a report as one self-contained page, which opens from a disk without a network.

It has no script, and a policy that lets nothing in: charts are inline SVG. Names, texts and templates come from
strangers; Jinja escapes every one, and characters that change how others are shown are made visible.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from app.report_page import certainty, outcome, weights
from app.report_page.charts import HEIGHTS
from app.report_page.figures import Figures, Section
from bitwright.report import Report

FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of the page itself, in a <meta>: it is opened from disks, where no server sends headers."""
TEMPLATES = ("report.html.jinja", "charts.html.jinja", "report.css")
FENCE = re.compile(r"^```[\w-]*\n(.*?)^```$", re.M | re.S)
KEPT = frozenset("\n\t")


def report_page(report: Report, *, title: str, load: Sequence[str] = ()) -> str:
    """The page.

    title   names the result, in one line
    load    the card's paragraphs on loading, in Markdown; empty: the page has no section on it
    """
    figures = Figures(report.model_dump(mode="json"))
    sections = [
        outcome.quality(report, figures),
        certainty.tasks(report, figures),
        certainty.kinds(report, figures),
        certainty.noise(report, figures),
        loading(load),
        outcome.tried(report, figures),
        outcome.generations(report, figures),
        weights.sizes(report, figures),
        outcome.goal(report, figures),
        weights.linears(report, figures),
        weights.blocks(report, figures),
        outcome.scales(report, figures),
        outcome.training(report, figures),
        outcome.merge(report, figures),
        outcome.times(report, figures),
        outcome.settings(report, figures),
    ]
    return template().render(
        title=title,
        policy=POLICY,
        report=report,
        tiles=outcome.tiles(report, figures),
        sections=[section for section in sections if section is not None],
        heights=HEIGHTS,
    )


def loading(paragraphs: Sequence[str]) -> Section | None:
    """The card's lines as text and code."""
    parts = []
    for paragraph in paragraphs:
        for number, piece in enumerate(FENCE.split(paragraph)):
            if piece.strip():
                parts.append(
                    (number % 2 == 1, piece.strip("\n") if number % 2 else " ".join(piece.replace("**", "").split()))
                )
    return Section("load", "Load", code=tuple(parts)) if parts else None


def visible(value: Any) -> Any:
    """A text with a mark in place of each character that is not shown, or turns the direction of others.

    Markup is what the templates' own macros made: its texts have been here.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join("\N{REPLACEMENT CHARACTER}" if _hidden(character) else character for character in value)


def _hidden(character: str) -> bool:
    return character not in KEPT and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn")


@cache
def template() -> Template:
    """The page's template, which a process compiles once, with those that it takes parts from."""
    folder = files(__package__)
    loader = DictLoader({name: (folder / name).read_text(encoding="utf-8") for name in TEMPLATES})
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page, *_ = [environment.get_template(name) for name in TEMPLATES]
    return page
