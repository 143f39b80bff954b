"""A check as others read it: Markdown for a pull request's page, JUnit's XML for the CI's own list of tests."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from bitwright.cli.comparison import Compared, doubts, figure_rows, settings_rows
from bitwright.cli.gates import Check, Outcome, verdict
from bitwright.errors import InvalidRequest

TITLES = {
    Outcome.PASSED: "Bitwright: passed",
    Outcome.MISSED: "Bitwright: not good enough",
    Outcome.ERROR: "Bitwright: could not be checked",
}
MARKS = {Outcome.PASSED: "✅ passed", Outcome.MISSED: "❌ missed", Outcome.ERROR: "⚠️ error"}
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def markdown(subject: str, checks: Sequence[Check], results: Sequence[Compared]) -> str:
    """A heading with the verdict, a table of checks, and one of the results' figures side by side.

    subject   what was checked: a job, or the file of the request
    results   this one and the baseline, as far as they are there
    """
    lines = [f"### {TITLES[verdict(checks)]}", "", f"`{subject}`", ""]
    lines += _table(["Check", "", ""], [[check.name, MARKS[check.outcome], check.detail] for check in checks])
    if results:
        rows = [row for row in settings_rows(results) if row.differs or len(results) == 1]
        table = [[row.name, *row.texts] for row in (*rows, *figure_rows(results))]
        lines += ["", *_table(["", *(result.name for result in results)], table)]
    if len(results) > 1:
        lines += [f"\nCareful: {doubt}." for doubt in doubts(results)]
    return "\n".join(lines) + "\n"


def junit(subject: str, checks: Sequence[Check], seconds: float) -> Element:
    """One test case for each check."""
    counts = {name: str(sum(check.outcome is outcome for check in checks)) for name, outcome in _KINDS}
    attributes = {"name": "bitwright", "tests": str(len(checks)), "time": f"{seconds:.3f}", **counts}
    suite = Element("testsuite", attributes)
    for check in checks:
        case = SubElement(suite, "testcase", name=check.name, classname=NOT_IN_XML.sub("?", subject))
        for name, outcome in _KINDS:
            if check.outcome is outcome:
                text = NOT_IN_XML.sub("?", check.detail)
                SubElement(case, name.removesuffix("s"), message=text, type=outcome.value).text = text
    indent(suite)
    return suite


_KINDS = (("failures", Outcome.MISSED), ("errors", Outcome.ERROR))


def append(path: Path, text: str) -> None:
    """Add text to a file, which may be there already: a step's summary is what all of its commands wrote.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", field="summary", value=str(path)) from error


def write_junit(path: Path, suite: Element) -> None:
    """Write JUnit's XML in place of an earlier one.

    Raises:
        InvalidRequest: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", field="junit", value=str(path)) from error


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
