"""The error tree: one code a class, and a docstring that tells the truth."""

import json
import re
import traceback

import pytest

from bitwright import errors
from bitwright.errors import ERRORS, BitwrightError, InternalError, Retry, error_from_code, shorten


def classes(root: type[BitwrightError] = BitwrightError) -> list[type[BitwrightError]]:
    """The classes of the domain: other parts may derive one for a header of theirs, with the same code."""
    own = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in own for found in classes(child))]


def drawn_tree() -> dict[str, tuple[str, int | None, str | None]]:
    """Class -> (parent, status, code) as the module's docstring draws them."""
    lines = (errors.__doc__ or "").splitlines()
    found: dict[str, tuple[str, int | None, str | None]] = {}
    ancestors: list[tuple[int, str]] = [(-1, "BitwrightError")]
    for line in lines[lines.index("BitwrightError") + 1 :]:
        match = re.match(r"^([| ]*)[|`]-- (\w+)\s*(\d{3})?\s*([a-z_]+)?(?=\s|$)", line)
        assert match, line
        depth, name = len(match[1]), match[2]
        while ancestors[-1][0] >= depth:
            ancestors.pop()
        found[name] = (ancestors[-1][1], int(match[3]) if match[3] else None, match[4])
        ancestors.append((depth, name))
    return found


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in classes()]
    assert len(codes) == len(set(codes))
    assert {cls.code: cls for cls in classes()} == ERRORS


def test_every_class_has_a_code_and_title_of_its_own() -> None:
    for cls in classes():
        assert "code" in vars(cls), cls
        assert "title" in vars(cls), cls


def test_the_docstring_draws_the_tree() -> None:
    drawn = drawn_tree()
    assert drawn.keys() == {cls.__name__ for cls in classes()} - {"BitwrightError"}
    for cls in classes()[1:]:
        parent, status, code = drawn[cls.__name__]
        assert cls.__bases__[0].__name__ == parent, cls
        if len(classes(cls)) > 1 and code is None:
            continue  # an inner class is drawn with a description
        assert cls.code == code or len(classes(cls)) > 1, cls
        assert status is None or cls.status == status, cls


def test_a_caller_error_is_never_retried_and_a_platform_error_is() -> None:
    for cls in classes(errors.RequestError) + classes(errors.InputError):
        assert cls.retry is Retry.NEVER
        assert 400 <= cls.status < 500
    for cls in classes(errors.PlatformError):
        assert cls.retry is (Retry.NEVER if cls is errors.AttemptSuperseded else Retry.LATER)
        assert cls.status >= 500


def test_an_error_survives_its_code() -> None:
    error = error_from_code("out_of_memory", "31 GB were needed", hint="use a smaller batch")
    assert isinstance(error, errors.OutOfMemory)
    assert (error.detail, error.hint) == ("31 GB were needed", "use a smaller batch")
    assert isinstance(error_from_code("of_another_version", "x"), InternalError)


@pytest.mark.parametrize(
    ("value", "short"),
    [
        (None, None),
        (True, True),
        (4, 4),
        (1.5, 1.5),
        ("text", "text"),
        (float("inf"), "inf"),
        (2**63, str(2**63)),
        ("\ud800", "\\ud800"),
        ([1, {"a": None}], "[1, {'a': None}]"),
        ("x" * 300, "x" * 199 + "…"),
    ],
)
def test_shorten_gives_what_json_can_hold(value: object, short: object) -> None:
    assert shorten(value) == short
    json.dumps(shorten(value), allow_nan=False).encode()


def test_shorten_survives_what_cannot_be_printed() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(10**5000) == "int, too large to show"
    assert shorten(nested) == "list, too large to show"


def test_a_traceback_shows_the_way_out_and_every_problem() -> None:
    problems = tuple(
        errors.FieldProblem(field=field, code="invalid_value", detail=f"mend {field}") for field in ("bits", "method")
    )
    for error, lines in (
        (errors.NotFound("no such job", hint="list them"), ["list them"]),
        (errors.NotFound("no such job"), [errors.NotFound.way_out]),
        (errors.InvalidRequest("two problems", errors=problems), ["bits: mend bits", "method: mend method"]),
        (errors.InvalidRequest("bits: mend bits", errors=problems[:1]), []),
    ):
        shown = "".join(traceback.format_exception(error)).splitlines()
        assert shown == [f"bitwright.errors.{type(error).__name__}: {error.detail}", *lines]
        assert str(error) == error.detail
