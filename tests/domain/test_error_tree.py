"""Every error has a way out: its class in docs/reference/errors.md, and every place that raises it, as far as seen.

A class whose one way out fits wherever it is raised gives it by itself. The others, whose cause only the place knows,
are given a hint there.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitwright import errors
from bitwright.errors import ERRORS, BitwrightError, FieldProblem, InputError
from tests.domain.test_errors import classes

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(\w+)` \| \d{3} \| \w+ \| .+? \| (.+) \|$", re.MULTILINE)
LINK = re.compile(r" \(\[[^]]*\]\([^)]*\)\)")
"""The page may point to more, in parentheses."""
BY_PLACE = {errors.RequestError, errors.InvalidRequest, errors.Conflict, *classes(InputError)} - {
    errors.CorruptCheckpoint  # most are damage, and that is mended one way; names and shapes get hints of their own
}
"""Classes that are raised for many reasons."""
NO_WAY_OUT = re.compile(r"^(read `detail`|see above|none)\.?$", re.IGNORECASE)


def test_every_class_has_a_way_out_of_its_own_and_the_page_has_it() -> None:
    page = dict(ROW.findall((ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")))
    assert page.keys() == ERRORS.keys()
    for each in classes():
        assert "way_out" in vars(each), each
        assert len(each.way_out) > 15, each
        assert not NO_WAY_OUT.match(each.way_out), each
        assert LINK.sub("", page[each.code]).replace('"', "'") == each.way_out, each


def test_an_error_without_a_hint_has_that_of_its_class() -> None:
    for each in classes():
        assert each("something is wrong").hint == each.way_out
        assert each("something is wrong", hint="do so").hint == "do so"
    problem = FieldProblem(field="bits", code="out_of_range", detail="must be 2 to 8")
    assert errors.InvalidRequest("two things", errors=(problem,)).hint is None, "each problem says its own way out"


def raised() -> Iterator[tuple[str, type[BitwrightError], ast.Call]]:
    """(place, class, call) of every construction of an error in the product's source."""
    known = {each.__name__: each for each in classes()}
    for file in sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                if name in known:
                    yield f"{file.relative_to(ROOT)}:{call.lineno}", known[name], call


def test_every_place_that_raises_for_one_of_many_reasons_says_the_way_out() -> None:
    found = list(raised())
    assert len(found) > 200, "the walk has lost its way"
    silent = [
        f"{place} {kind.__name__}"
        for place, kind, call in found
        if kind in BY_PLACE
        # `**fields` hands on what another error had; `errors` have a way out each.
        and not {keyword.arg for keyword in call.keywords} & {"hint", "errors", None}
    ]
    assert silent == [], "give these a hint"


def test_no_hint_is_empty() -> None:
    """Of those that are written where they are given."""
    hints = [
        keyword.value.value
        for _, _, call in raised()
        for keyword in call.keywords
        if keyword.arg == "hint" and isinstance(keyword.value, ast.Constant)
    ]
    assert len(hints) > 50
    assert all(isinstance(hint, str) and len(hint) > 8 for hint in hints)


PATHS = re.compile(r"\b(folder|source\.folder|checkpoint\.folder|workspace|model_path|base_job_path)\b(?!\.name)(?!')")


def test_no_message_of_the_engine_shows_a_folder_of_the_worker() -> None:
    """An f-string of an error may name a file, never where it lies."""
    leaks = []
    for place, _, call in raised():
        if not place.startswith("workers/"):
            continue
        for part in ast.walk(call):
            if isinstance(part, ast.FormattedValue) and PATHS.search(ast.unparse(part.value)):
                leaks.append(f"{place} {ast.unparse(part)}")
    assert leaks == []


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_an_error_from_its_code_has_a_way_out(code: str) -> None:
    """Errors that another process reported, even one that gave no hint."""
    assert errors.error_from_code(code, "it broke").hint
