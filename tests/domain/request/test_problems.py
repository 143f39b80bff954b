"""Texts that nothing can store: each place is told once, whatever its names are shown as."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.request.job_request import JobRequest
from app.domain.request.problems import MAX_PROBLEMS, text_problems
from bitwright.errors import InvalidRequest

UNSTORABLE = ["a\0", "b\0", "\0", "\ud800", "\udfff", "x\udbffy"]
STORABLE = ["a", "\x01", "\ud7ff", "\ue000", "\U0010ffff", "\\ud800"]


def places(body: dict[str, Any]) -> list[str]:
    found = text_problems(body)
    assert all((problem.code, "U+0000" in problem.detail) == ("invalid_value", True) for problem in found)
    return sorted(problem.field for problem in found)


@pytest.mark.parametrize("text", UNSTORABLE)
def test_a_text_is_refused_as_a_value_and_as_a_name(text: str) -> None:
    assert places({"a": {"b": [0, text]}}) == ["a.b.1"]
    assert places({"a": {text: 1}}) == ["a"]
    assert places({text: 1}) == ["body"]


@pytest.mark.parametrize("text", STORABLE)
def test_every_other_text_is_none_of_its_business(text: str) -> None:
    assert places({text: [text, {text: text}], "n": [1, None, True, 1.5]}) == []


def test_names_that_differ_by_what_cannot_be_shown_are_told_once() -> None:
    assert places({"metadata": {"a\0": 1, "b\0": 2}}) == ["metadata"]
    assert places({"metadata": {"\ud800": "\0", "\\ud800": "\0"}}) == ["metadata", "metadata.\\ud800"]
    assert places({"x\0": 1, "y\0": 1, "\ud800": 1}) == ["body"]


def test_many_places_get_a_bounded_answer() -> None:
    assert MAX_PROBLEMS == 100
    assert len(places({"a": ["\0"] * 1000})) == 100
    assert len(places({"a": {f"{number}\0": "\0" for number in range(1000)}})) == 100


TEXTS = st.sampled_from([*UNSTORABLE, *STORABLE]) | st.text(st.characters(), max_size=3)
ANY = st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@given(st.dictionaries(TEXTS, ANY, max_size=4))
def test_no_place_is_told_twice(body: dict[str, Any]) -> None:
    found = places(body)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("body", "said"),
    [(None, "null"), ("x", "a string"), ([], "an array"), (True, "a boolean"), (1, "a number"), (1.5, "a number")],
)
def test_a_body_that_is_no_object_is_named_by_its_type(body: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"must be a JSON object, not {said}$"):
        JobRequest.parse(body)
