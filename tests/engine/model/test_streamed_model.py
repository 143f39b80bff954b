"""Block by block is the whole model: logits, names, buffers, memory."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from app.domain.inputs.architectures import ARCHITECTURES
from bitwright.errors import CorruptCheckpoint, NumericalFailure, UnsupportedArchitecture
from tests.engine.model.random_models import LENGTH, PECULIARITIES, VOCABULARY, WINDOW, save_random_model
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel, run_block

CPU = torch.device("cpu")


def open_model(folder: Path) -> StreamedModel:
    return StreamedModel.open(Checkpoint.open(folder), CPU)


def streamed_logits(model: StreamedModel, ids: torch.Tensor, micro_batch: int) -> torch.Tensor:
    calls = model.capture_calls(ids.shape[1])
    with torch.no_grad(), model.loaded(*model.layout.outer):
        hidden = model.embed(ids)
    for index, call in enumerate(calls):
        with model.loaded(model.layout.block(index)):
            run_block(call, model.blocks[index], hidden, hidden, micro_batch=micro_batch, device=CPU)
    with model.loaded(*model.after_blocks):
        return model.logits(hidden)


@pytest.mark.parametrize("architecture", PECULIARITIES)
def test_block_by_block_gives_the_logits_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    whole = save_random_model(tmp_path, architecture)
    ids = torch.randint(VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    assert LENGTH > WINDOW
    with torch.no_grad():
        expected = whole(ids).logits
    found = streamed_logits(open_model(tmp_path), ids, micro_batch=2)
    # Fused blocks add in another order: a few units in the last place of sums of this size.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gemma3_text"])
def test_the_sliding_window_matters_in_that_comparison(architecture: str, tmp_path: Path) -> None:
    model = save_random_model(tmp_path, architecture)
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCABULARY
    sliding = open_model(tmp_path)
    masks = [call.keywords["attention_mask"] for call in sliding.capture_calls(LENGTH)]
    assert any(mask is not None and not mask[0, 0, -1, 0] for mask in masks)
    assert not torch.equal(model(ids).logits, model(changed).logits)


@pytest.mark.parametrize(("architecture", "distinct"), [("llama", 1), ("qwen3", 1), ("gemma3_text", 2)])
def test_blocks_that_are_called_alike_share_their_call(architecture: str, distinct: int, tmp_path: Path) -> None:
    """A captured step serves blocks of one call; Gemma's layers are of two kinds."""
    save_random_model(tmp_path, architecture)
    calls = open_model(tmp_path).capture_calls(LENGTH)
    assert len(calls) == 4
    assert len(set(map(id, calls))) == distinct
    assert calls[0] is calls[2]
    assert (calls[0] is calls[1]) == (distinct == 1)


def test_every_architecture_of_the_domain_that_has_no_layout_is_refused_by_name(tmp_path: Path) -> None:
    assert set(PECULIARITIES) <= set(ARCHITECTURES)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3n"}')
    save_random_model(tmp_path / "weights", "llama")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedArchitecture, match="gemma3n") as caught:
        open_model(tmp_path)
    assert caught.value.hint


def test_only_the_parts_in_use_have_memory(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    model = open_model(tmp_path)
    assert {p.device.type for p in model.model.parameters()} == {"meta"}
    assert {b.device.type for b in model.model.buffers()} == {"cpu"}
    with model.loaded(model.layout.block(1)):
        real = {n for n, p in model.model.named_parameters() if p.device.type == "cpu"}
        assert real == {f"model.layers.1.{n}" for n, _ in model.blocks[1].named_parameters()}
    assert {p.device.type for p in model.model.parameters()} == {"meta"}
    weights = model.read(model.layout.block(1))
    assert {p.device.type for p in model.model.parameters()} == {"meta"}, "reading alone fills nothing"
    with model.filled(weights):
        assert {n for n, p in model.model.named_parameters() if p.device.type == "cpu"} == real
        assert weights == {}
    assert {p.device.type for p in model.model.parameters()} == {"meta"}


def test_a_tensor_without_a_parameter_is_named(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.extra.weight": torch.zeros(2, 2)})
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.0\.self_attn\.extra\.weight"):
        open_model(tmp_path)


def test_a_parameter_without_a_tensor_is_named(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "layers.2.mlp.up_proj" not in k})
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        open_model(tmp_path)


def test_a_shape_that_differs_from_the_configuration_is_named(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: tensors | {"model.norm.weight": torch.ones(31)})
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight.*31.*32"):
        open_model(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    with pytest.raises(CorruptCheckpoint, match="I32"):
        open_model(tmp_path)


def test_rotary_frequencies_of_old_checkpoints_are_left_aside(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    open_model(tmp_path)


def test_names_without_the_base_model_prefix_are_mapped(tmp_path: Path) -> None:
    whole = rewrite(tmp_path, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    ids = torch.arange(LENGTH).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(streamed_logits(open_model(tmp_path), ids, 1), whole(ids).logits)


def test_a_stored_copy_of_a_tied_head_must_be_a_copy(tmp_path: Path) -> None:
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert open_model(tmp_path).tied
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CorruptCheckpoint, match=r"ties lm_head\.weight"):
        open_model(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_when_it_is_read(value: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.3.mlp.down_proj.weight"][1, 2] = value
        return tensors

    rewrite(tmp_path, spoil)
    model = open_model(tmp_path)
    with pytest.raises(NumericalFailure, match=r"layers\.3\.mlp\.down_proj"), model.loaded("model.layers.3"):
        pass


def rewrite(folder: Path, change: object) -> PreTrainedModel:
    """A random llama whose stored tensors went through `change`."""
    from safetensors.torch import load_file, save_file

    model = save_random_model(folder, "llama")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})  # type: ignore[operator]
    return model
