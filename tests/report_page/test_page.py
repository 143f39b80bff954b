"""report.html: its numbers are report.json's, and nothing that a stranger wrote lives in it."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from app.report_page.charts import LEVELS, Series, heatmap, plot, width_map
from app.report_page.page import POLICY, report_page
from app.report_page.weights import MOST_ROWS
from bitwright.report import Report
from tests.report_page.reports import full, with_strings
from tests.reports import report

VOID = frozenset({"meta", "rect", "line", "circle", "path"})
HARMLESS = frozenset(
    [
        *["html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "dl"],
        *["div", "dt", "dd", "small", "data", "ul", "li", "figure", "figcaption", "svg", "rect", "text", "line", "g"],
        *[
            "path",
            "circle",
            "table",
            "caption",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "details",
            "summary",
            "pre",
            "code",
        ],
    ]
)
HOSTILE = (
    "'\"><script>alert(1)</script><img src=x onerror=alert(2)></style></title>{{7*7}}{% raw %}javascript:&#x6a;"
    "\u202e\x00"
)
LITERALS = frozenset({"affine", "files", "block", "loads", "kl", "linears"})
"""Words of closed sets in the report, which a stranger cannot choose."""


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.styles if self.open[-1:] == ["style"] else self.words).append(data)

    def attributes(self, name: str) -> list[str]:
        """Values of an attribute, in order."""
        return [value for _, found in self.elements if (value := found.get(name)) is not None]


def page(made: Report, **more: Any) -> Page:
    return Page(report_page(made, **{"title": "tiny, SignRound", **more}))


def at(document: Any, pointer: str) -> Any:
    """The value at a JSON pointer, by RFC 6901."""
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def numbers(document: Any, pointer: str = "") -> Iterator[str]:
    """Pointers of all numbers in a JSON document."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield from numbers(value, f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(document, list):
        for n, value in enumerate(document):
            yield from numbers(value, f"{pointer}/{n}")
    elif isinstance(document, int | float) and not isinstance(document, bool):
        yield pointer


def test_every_number_is_the_one_of_report_json() -> None:
    made = full()
    document, shown = json.loads(json.dumps(made.model_dump(mode="json"))), page(made)
    told = [(found["data-at"], found["value"]) for tag, found in shown.elements if tag == "data"]
    assert len(told) > 300
    for pointer, value in told:
        assert json.loads(value or "") == at(document, pointer or ""), pointer


UNREAD = re.compile(r"/text/|/noise/(?!kl)|/kinds/\d+/(perplexity|sequences)|noise/perplexity_ratio")


def test_the_figures_that_people_look_for_are_there() -> None:
    """Everything that is measured, but what has no reader: text sizes, memory plans, shapes."""
    document = full().model_dump(mode="json")
    shown = set(page(full()).attributes("data-at"))
    for part in ("quality", "shipped", "round_to_nearest", "size", "seconds", "scales_rounded"):
        wanted = {f"/{part}{pointer}" for pointer in numbers(document[part]) if not UNREAD.search(pointer)}
        assert wanted - shown - {"/size/parts/codebooks"} == set()  # nothing is stored in codebooks here
    for n, block in enumerate(document["blocks"]):
        assert {f"/blocks/{n}/{name}" for name in ("loss", "loss_initial", "output_error", "seconds")} <= shown
        for m in range(len(block["linears"])):
            assert {f"/blocks/{n}/linears/{m}/{name}" for name in ("bits", "weight_error", "output_error")} <= shown
    curves = ("losses", "validations")
    assert {f"/finetuning/{name}{at}" for name in curves for at in numbers(document["finetuning"][name])} <= shown
    assert {f"/adapter/merge{pointer}" for pointer in numbers(document["adapter"]["merge"])} <= shown


def test_hostile_strings_stay_text() -> None:
    def hostile(text: str) -> str:
        return text if text in LITERALS else text + HOSTILE

    document = with_strings(full().model_dump(mode="json"), hostile)
    for part in ("plan", "seconds", "scales_rounded"):
        document[part] |= {HOSTILE: 1.5}
    document["size"]["bytes_files"][HOSTILE] = 5
    made = Report.model_validate(document)
    plain = page(full(), load=("Load:\n\n```python\na\n```",))
    shown = page(made, title=HOSTILE, load=(f"{HOSTILE}\n\n```python\n{HOSTILE}\n```",))
    assert shown.open == []
    assert {tag for tag, _ in shown.elements} <= HARMLESS
    kinds = {(tag, name) for tag, found in plain.elements for name in found}
    assert {(tag, name) for tag, found in shown.elements for name in found} <= kinds
    assert shown.styles == plain.styles
    told = "".join(shown.words)
    assert told.count("<script>alert(1)</script>") > 130
    assert "{{7*7}}{% raw %}" in told
    assert "\u202e" not in report_page(made, title=HOSTILE)
    assert "\x00" not in report_page(made, title=HOSTILE)


def test_nothing_is_loaded_or_run() -> None:
    shown = page(full(), load=("Load:\n\n```python\na\n```",))
    assert POLICY == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy = [found for tag, found in shown.elements if found.get("http-equiv") == "Content-Security-Policy"]
    assert [found["content"] for found in policy] == [POLICY]
    names = {name for _, found in shown.elements for name in found}
    assert not any(name.startswith("on") or name in ("src", "href", "style", "action", "srcdoc") for name in names)
    assert "url(" not in "".join(shown.styles)
    assert "@import" not in "".join(shown.styles)


def test_ids_are_unique_and_every_label_is_there() -> None:
    shown = page(full(), load=("Load:\n\n```python\na\n```",))
    ids = shown.attributes("id")
    assert len(ids) == len(set(ids))
    assert set(shown.attributes("aria-labelledby")) <= set(ids)
    assert ids == [
        *(
            "warnings",
            "quality",
            "tasks",
            "kinds",
            "noise",
            "load",
            "loads",
            "generations",
            "size",
            "goal",
            "linears",
            "blocks",
        ),
        *("scales", "training", "merge", "time", "settings"),
    ]


def test_generations_stand_side_by_side() -> None:
    told = "".join(page(full()).words)
    assert told.index("The statement is used") < told.index("The statement is not")
    assert "/loads/0/written/same" in page(full()).attributes("data-at")


def test_it_is_made_the_same_every_time() -> None:
    assert report_page(full(), title="tiny") == report_page(full(), title="tiny")


@pytest.mark.parametrize("made", [report(), full(blocks=1), full(blocks=0)], ids=["bare", "one block", "no block"])
def test_a_report_with_less_has_a_page(made: Report) -> None:
    shown = page(made)
    assert "settings" in shown.attributes("id")
    assert "NaN" not in "".join(shown.attributes("d"))


def test_of_many_linears_the_worst_are_listed() -> None:
    made = full(blocks=MOST_ROWS // 5 + 8)
    shown = page(made)
    listed = [pointer for pointer in shown.attributes("data-at") if pointer.endswith("/weight_error")]
    assert len(listed) == MOST_ROWS
    linears = [linear for block in made.blocks for linear in block.linears]
    outside = [linear for linear in (made.embeddings, made.head) if linear is not None]
    worst = sorted((one.output_error or 0 for one in [*linears, *outside]), reverse=True)
    document = made.model_dump(mode="json")
    errors = [at(document, pointer.replace("weight_error", "output_error")) for pointer in listed]
    assert sorted(errors, reverse=True) == pytest.approx(worst[:MOST_ROWS])
    assert f"of {len(worst)}" in "".join(shown.words)


def test_a_heatmaps_shades_rise_with_its_values() -> None:
    values = {("a", str(n)): 10.0**n for n in range(5)}
    drawn = heatmap("errors", ["a", "b"], [str(n) for n in range(5)], values, {})
    assert [cell.shade for cell in drawn.cells] == [0, 2, 4, 6, LEVELS - 1]
    assert [cell.x for cell in drawn.cells] == sorted(cell.x for cell in drawn.cells)
    assert (drawn.least, drawn.most) == ("1", "1e+04")
    alike = heatmap("errors", ["a"], ["0", "1"], {("a", "0"): 0.5, ("a", "1"): 0.5}, {})
    assert [cell.shade for cell in alike.cells] == [0, 0]


def test_a_missing_linear_leaves_its_cell_out() -> None:
    drawn = width_map("bits", ["a", "b"], ["0", "1"], {("a", "0"): 4, ("b", "1"): 2})
    assert [(cell.text, cell.shade) for cell in drawn.cells] == [("4", LEVELS - 1), ("2", 0)]


def test_a_plots_points_lie_where_their_values_say() -> None:
    points = [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)]
    drawn = plot("loss", [Series("train", points)], "step", "loss")
    (left, low), (middle, high), (right, between) = drawn.lines[0].points
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert between == pytest.approx((low + high) / 2, abs=0.1)
    assert high < between < low
    assert drawn.y_title == "loss"


def test_losses_far_apart_are_drawn_by_their_logarithm() -> None:
    drawn = plot("loss", [Series("train", [(0, 0.001), (1, 0.01), (2, 1.0)])], "block", "loss")
    first, second, third = (y for _, y in drawn.lines[0].points)
    assert (first - second) / (first - third) == pytest.approx(1 / 3, abs=0.01)
    assert drawn.y_title == "loss, logarithmic"


@pytest.mark.parametrize("values", [[], [0.0], [2.5, 2.5], [math.inf, 1.0], [math.nan, 1.0, 2.0], [-1.0, 1.0]])
def test_a_plot_of_odd_values_is_finite(values: list[float]) -> None:
    drawn = plot("loss", [Series("train", list(enumerate(values)))], "step", "loss")
    assert all(math.isfinite(number) for line in drawn.lines for point in line.points for number in point)
    assert "nan" not in drawn.lines[0].path
