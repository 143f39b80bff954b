"""Names of jobs: all of them are names that the Hub's client takes, and what is refused says why."""

import pytest
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.domain.request.job_name import PATTERN, JobName, repository_of

NAMES = TypeAdapter(JobName)


@given(st.from_regex(PATTERN.replace("$", r"\Z"), fullmatch=True).filter(lambda name: len(name) <= 96))
def test_every_name_is_one_that_the_client_takes(name: str) -> None:
    try:
        NAMES.validate_python(name)
    except ValidationError:
        return
    validate_repo_id(repository_of(name))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("jobs/x", "write 'x' alone"),
        ("job_0123456789abcdefghjkmnpqrs", "could be an id"),
        ("llama.git", ".git"),
        ("acme.git/llama", ".git"),
        ("a--b", "pattern"),
        ("a/b/c", "pattern"),
        ("a\n", "pattern"),
        ("", "pattern"),
        ("x" * 97, "at most 96"),
    ],
)
def test_what_is_no_name(name: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        NAMES.validate_python(name)


def test_the_repository_of_a_name() -> None:
    assert [repository_of(name) for name in ("llama", "acme/llama")] == ["jobs/llama", "acme/llama"]
