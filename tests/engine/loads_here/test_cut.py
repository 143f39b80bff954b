"""The configuration of one layer, and the tensors of the first block alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from workers.engine.loads_here.cut import NotOneBlockError, first_block, one_layer, write_plain
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(small_model: Path) -> StreamedModel:
    return StreamedModel.open(Checkpoint.open(small_model), CPU)


def test_what_is_written_is_the_whole_model_up_to_its_first_block(
    model: StreamedModel, small_model: Path, tmp_path: Path
) -> None:
    write_plain(first_block(model), tmp_path / "cut")
    stored, whole = load_file(tmp_path / "cut" / "model.safetensors"), load_file(small_model / "model.safetensors")
    assert set(stored) == {name for name in whole if not name.startswith(("model.layers.1.", "model.layers.2."))}
    assert all(torch.equal(stored[name], whole[name]) for name in stored)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    original.model.layers = original.model.layers[:1]
    ids = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        assert torch.equal(cut(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"], ["full_attention"]),
        ("eos_token_id", [1, 2, 3], [1, 2, 3]),
        ("rope_scaling_factors", [1.0, 2.0], [1.0, 2.0]),
        ("per_layer_config", {"0": {"a": 1}, "2": {"a": 2}}, {"0": {"a": 1}}),
        ("per_layer_config", {"1": {"a": 1}, "2": {"a": 2}}, {}),
        ("rope_parameters", {"rope_type": "default"}, {"rope_type": "default"}),
        ("num_nextn_predict_layers", 1, 0),
        ("num_hidden_layers", 3, 1),
    ],
)
def test_what_a_configuration_has_for_each_layer_is_cut(
    model: StreamedModel, field: str, value: object, kept: object
) -> None:
    config: dict[str, Any] = {**model.checkpoint.config, field: value}
    before = json.dumps(config)
    assert one_layer(config, model)[field] == kept
    assert json.dumps(config) == before


def test_the_text_part_of_a_larger_configuration_is_cut(model: StreamedModel) -> None:
    config = {"text_config": dict(model.checkpoint.config), "vision_config": {"num_hidden_layers": 3}}
    cut = one_layer(config, model)
    assert (cut["text_config"]["num_hidden_layers"], cut["vision_config"]["num_hidden_layers"]) == (1, 3)


@pytest.mark.parametrize("layers", [None, 2, "3"])
def test_a_configuration_that_does_not_count_its_layers_is_not_cut(model: StreamedModel, layers: object) -> None:
    with pytest.raises(NotOneBlockError, match="num_hidden_layers that the model has 3 layers"):
        one_layer({**model.checkpoint.config, "num_hidden_layers": layers}, model)
