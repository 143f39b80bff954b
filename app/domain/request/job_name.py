"""Names that users give to jobs, which clients of a Hub take for names of repositories."""

from typing import Annotated

from pydantic import AfterValidator, StringConstraints

JOBS = "jobs"
"""Namespace of jobs without one in their name, under which each also has its id for a name."""
MOST = 96
_WORD = r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"
PATTERN = rf"^{_WORD}(?:/{_WORD})?$"
"""Narrower than a Hub's own rule: no `--` or `..`, no point or dash at an end."""


def _check(name: str) -> str:
    namespace, slash, last = name.rpartition("/")
    if namespace == JOBS:
        raise ValueError(f"write {last!r} alone: that is {JOBS}/{last} already")
    if not slash and last.startswith("job_"):
        raise ValueError("a name that begins with job_ could be an id; begin with something else")
    if any(part.endswith(".git") for part in name.split("/")):
        raise ValueError("a name does not end in .git: that is the address of a repository's history")
    return name


JobName = Annotated[str, StringConstraints(max_length=MOST, pattern=PATTERN), AfterValidator(_check)]


def repository_of(name: str) -> str:
    """The repository that a name, or a job's id, stands for: with a namespace, `org/name`."""
    return name if "/" in name else f"{JOBS}/{name}"
