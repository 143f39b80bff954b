"""Limits, defaults and names of the request, each as it stands in `tests/golden/request_limits.txt`.

A limit is a promise: who changes one changes its line there, with a line in CHANGELOG. The lines are
`path keyword value` of the request's JSON Schema; `python -m tests.domain.request.test_limits` writes them anew.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from app.domain.request.job_request import JobRequest

LIMITS = Path(__file__).parents[2] / "golden" / "request_limits.txt"
KEYWORDS = frozenset(
    {
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
        "minItems", "maxItems", "uniqueItems", "maxProperties", "default", "const", "enum", "required",
        "additionalProperties",
    }
)  # fmt: skip


def limits(node: object, path: str = "") -> Iterator[str]:
    """A line for each keyword of a JSON Schema that says what is taken, or what is taken for granted."""
    if isinstance(node, dict):
        for keyword, value in node.items():
            if keyword in KEYWORDS and not isinstance(value, dict):
                yield f"{path} {keyword} {json.dumps(value)}"
            else:
                yield from limits(value, f"{path}/{keyword}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from limits(value, f"{path}/{index}")


def lines() -> list[str]:
    """All lines of the request's schema, sorted."""
    return sorted(limits(JobRequest.model_json_schema()))


def test_limits_and_defaults_are_those_that_were_promised() -> None:
    assert lines() == LIMITS.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    LIMITS.write_text("\n".join(lines()) + "\n", encoding="utf-8")
