"""Flags of `bitwright submit` for mixtures, tasks and training, as a request has them."""

from typing import Any

import pytest

from bitwright.cli.submit import parse_mixture, parse_tasks, set_training
from bitwright.errors import RequestError


def test_parts_of_a_mixture() -> None:
    assert parse_mixture(["org/chat:tools=0.3", "builtin=0.7"]) == [
        {"dataset": "org/chat", "kind": "tools", "share": 0.3},
        {"dataset": "builtin", "share": 0.7},
    ]
    for wrong in ("builtin", "builtin=most"):
        with pytest.raises(RequestError, match="is not SOURCE=SHARE"):
            parse_mixture([wrong])


def test_tasks() -> None:
    assert parse_tasks(["arc=multiple_choice:org/arc"]) == [
        {"name": "arc", "kind": "multiple_choice", "dataset": "org/arc"}
    ]
    assert parse_tasks(None) == []
    for wrong in ("arc", "arc=multiple_choice"):
        with pytest.raises(RequestError, match="is not NAME=KIND:SOURCE"):
            parse_tasks([wrong])


@pytest.mark.parametrize(
    ("body", "adapter", "expected"),
    [
        ({}, None, {"rank": 8}),
        ({}, "lora", {"adapter": {"kind": "lora", "rank": 8}}),
        ({"adapter": {"kind": "dora"}}, None, {"adapter": {"kind": "dora", "rank": 8}}),
        ({"quantization": {"method": "lq-lora"}}, None, {"quantization": {"method": "lq-lora", "rank": 8}}),
    ],
)
def test_a_rank_goes_where_the_request_has_its_adapter(
    body: dict[str, Any], adapter: str | None, expected: dict[str, Any]
) -> None:
    set_training(body, {"dataset": "upl_0", "epochs": 2.0, "steps": None}, adapter, 8, "quantized")
    assert body == {**expected, "finetune": {"dataset": "upl_0", "epochs": 2.0}, "merge": "quantized"}
