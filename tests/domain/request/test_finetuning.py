"""Finetuning in requests: accepted forms and refusals."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.domain.request.finetuning import Finetune


def of(**fields: Any) -> Finetune:
    return Finetune.model_validate({"dataset": {"source": "builtin"}, **fields})


def test_the_defaults_are_those_of_the_documentation() -> None:
    found = of().model_dump(exclude={"dataset"})
    expected: dict[str, object] = {
        "steps": 200,
        "batch_size": 8,
        "sequence_length": 512,
        "learning_rate": 2e-4,
        "warmup_share": 0.03,
    }
    expected |= {"schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.3, "loss_on": "completion"}
    assert found.items() >= expected.items()
    assert of(steps=1000).warmup_steps() == 30


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "200"}, "steps"),
        ({"steps": True}, "steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_share": 1.0}, "warmup_share"),
        ({"schedule": "cosin"}, "schedule"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"loss_on": "prompt"}, "loss_on"),
        ({"sequence_length": 8}, "sequence_length"),
        ({"validation_share": 0.6}, "validation_share"),
        ({"epochs": 0}, "epochs"),
        ({"dataset": {"source": "nowhere"}}, "dataset"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        of(**fields)
    assert {error["loc"][0] for error in caught.value.errors()} == {where}


@pytest.mark.parametrize("fields", [{}, {"validation_every": 10, "validation_share": 0.0}])
def test_patience_needs_something_to_judge_by(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="patience needs validation_every"):
        of(patience=3, **fields)
    assert of(patience=3, validation_every=10).patience == 3
