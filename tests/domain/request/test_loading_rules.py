"""Required runtimes: those that a format is read by, and only where something is read."""

from typing import Any

import pytest

from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest


def problems(**body: Any) -> dict[str, str]:
    try:
        JobRequest.parse({"model": "org/model", "method": "rtn", "bits": 4, **body})
    except InvalidRequest as error:
        return {problem.field: problem.code for problem in error.errors}
    return {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"require": {"loads": ["vllm", "transformers"]}}, {}),
        ({"require": {"loads": ["llama.cpp"]}, "formats": ["gguf"]}, {}),
        ({"require": {"loads": ["llama.cpp"]}}, {"require.loads.0": "conflicting_fields"}),
        ({"require": {"loads": ["transformers", "peft"]}}, {"require.loads.1": "conflicting_fields"}),
        ({"require": {"loads": ["vllm"]}, "verify": "off"}, {"verify": "conflicting_fields"}),
        ({"verify": "off"}, {}),
        ({"require": {"max_kl_divergence": 1.0}, "verify": "off"}, {}),
        ({"require": {"loads": ["sglang"]}}, {"require.loads.0": "invalid_value", "require.loads": "out_of_range"}),
        ({"require": {"loads": []}}, {"require.loads": "out_of_range"}),
        ({"verify": "all"}, {"verify": "invalid_value"}),
    ],
)
def test_what_can_be_required(body: dict[str, Any], expected: dict[str, str]) -> None:
    assert problems(**body) == expected


def test_an_adapter_alone_is_read_with_its_files() -> None:
    body = {"method": "loftq", "rank": 4, "formats": ["peft"], "require": {"loads": ["peft"]}}
    assert problems(**body) == {"require.loads.0": "conflicting_fields"}
    both = body | {"formats": ["merged", "peft"]}
    assert problems(**both) == {"require.loads.0": "conflicting_fields"}
    assert problems(**body, verify="files") == {}
