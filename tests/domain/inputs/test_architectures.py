"""Accepted types, reasons of refused ones, and shapes that headers show where the configuration does not."""

import json
from typing import Any

import pytest

from app.domain.inputs.architectures import (
    ACCEPTED_FILE,
    ARCHITECTURES,
    REFUSED,
    find_architecture,
    read_dimensions,
)
from app.domain.inputs.config_numbers import check_numbers
from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture

BLOOM: dict[str, Any] = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "vocab_size": 100}
TENSORS = {
    "word_embeddings.weight": (100, 64),
    "h.0.self_attention.query_key_value.weight": (192, 64),
    "h.0.self_attention.query_key_value.bias": (192,),
    "h.0.mlp.dense_h_to_4h.weight": (256, 64),
    "h.1.mlp.dense_h_to_4h.weight": (256, 64),
    "h.1.input_layernorm.weight": (64,),
    "ln_f.weight": (64,),
}


def test_every_accepted_type_was_proved() -> None:
    rows = json.loads(ACCEPTED_FILE.read_text())["types"]
    assert len(rows) >= 60
    for name, row in rows.items():
        assert row["streamed"] < 1e-4, name
        assert {"rtn, native", "rtn, merged", "signround, merged"} <= set(row["perplexity"]), name
        assert max(row["perplexity"].values()) < 0.005, name
        assert ("rtn, compressed-tensors" in row["perplexity"]) != ("compressed-tensors" in row["refusals"]), name


def test_a_refused_type_has_its_reason_and_the_place_of_the_list() -> None:
    assert not set(REFUSED) & set(ARCHITECTURES)
    for name, reason in REFUSED.items():
        with pytest.raises(UnsupportedArchitecture) as caught:
            find_architecture({"model_type": name})
        assert reason in caught.value.detail
        assert "GET /v1/architectures" in str(caught.value.hint)


def test_shapes_of_other_types_come_from_the_headers() -> None:
    found = read_dimensions(BLOOM, TENSORS)
    assert not found.exact
    assert found.linears() == {
        "h.0.self_attention.query_key_value": (192, 64),
        "h.0.mlp.dense_h_to_4h": (256, 64),
        "h.1.mlp.dense_h_to_4h": (256, 64),
    }
    assert found.block_linears() == {"self_attention.query_key_value": (192, 64), "mlp.dense_h_to_4h": (256, 64)}
    assert found.block_weights == (192 + 2 * 256) * 64
    assert found.head_weights == 6400
    assert (found.layers, found.hidden, found.tied_embeddings) == (2, 64, True)


def test_numbers_of_the_text_model_inside_a_wrapper_are_read() -> None:
    wrapper = {"model_type": "llava", "text_config": {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 10}}
    experts = {"model.layers.0.mlp.experts.gate_up_proj": (4, 20, 48), "lm_head.weight": (10, 48)}
    found = read_dimensions(wrapper, experts)
    assert (found.hidden, found.layers, found.vocabulary, found.tied_embeddings) == (48, 3, 10, False)
    assert found.linears() == {"model.layers.0.mlp.experts.gate_up_proj": (80, 48)}


@pytest.mark.parametrize("config", [{"n_layer": 10**9}, {"text_config": {"vocab_size": -1}}, {"d_model": "64"}])
def test_numbers_that_would_size_a_model_are_checked_under_every_name(config: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint, match="must be a whole number"):
        check_numbers({**BLOOM, **config})
