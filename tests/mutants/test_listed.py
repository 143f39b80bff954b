"""The list of mistakes still fits the sources, so that it can be run at any time."""

import ast
from collections import Counter

import pytest

from tests.documentation import ROOT
from tests.mutants.listed_mistakes import Mistake, listed

MISTAKES = listed()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.id)
def test_a_mistake_changes_what_its_file_computes(mistake: Mistake) -> None:
    source = (ROOT / mistake.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mistake.text())) != ast.dump(ast.parse(source))
    assert len(mistake.damage.split()) >= 3
    assert mistake.tests
    for test in mistake.tests:
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_every_mistake_has_a_name_of_its_own() -> None:
    assert [name for name, times in Counter(mistake.id for mistake in MISTAKES).items() if times > 1] == []


def test_a_mistake_that_no_longer_fits_is_seen() -> None:
    mistake = Mistake("X", "pyproject.toml", "no such text", "", "nothing at all happens", ("tests",))
    with pytest.raises(ValueError, match="0 times"):
        mistake.text()
