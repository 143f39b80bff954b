"""Shapes that a configuration promises, files that transformers would rather load, and marks of quantized tensors."""

from pathlib import Path
from typing import Any

import pytest

from app.domain.inputs.architectures import ARCHITECTURES, LLAMA_SHAPE, read_dimensions
from app.domain.inputs.checkpoint_choice import check_choice
from app.domain.inputs.quantized_tensors import quantized_tensor
from app.domain.inputs.roots import check_links, lies_under
from bitwright.errors import CorruptCheckpoint, SourceForbidden, UnsupportedArchitecture

CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3},
    **{"num_hidden_layers": 2, "vocab_size": 50},
}


def test_the_linears_of_a_block() -> None:
    found = read_dimensions({**CONFIG, "num_key_value_heads": 1, "head_dim": 5})
    assert found.block_linears() == {
        "self_attn.q_proj": (15, 12),
        "self_attn.k_proj": (5, 12),
        "self_attn.v_proj": (5, 12),
        "self_attn.o_proj": (12, 15),
        "mlp.gate_proj": (20, 12),
        "mlp.up_proj": (20, 12),
        "mlp.down_proj": (12, 20),
    }
    names = list(found.linears())
    assert (len(names), names[0], names[-1]) == (14, "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def test_what_transformers_assumes_where_the_configuration_is_silent() -> None:
    def silent(model_type: str, *without: str, **given: object) -> tuple[int, int, int, int, bool]:
        config = {key: value for key, value in CONFIG.items() if key not in without}
        found = read_dimensions({**config, "model_type": model_type, "head_dim": None, **given})
        return found.heads, found.key_value_heads, found.head_dim, found.vocabulary, found.tied_embeddings

    assert set(LLAMA_SHAPE) == {"llama", "mistral", "qwen2", "qwen3", "gemma3_text"}
    assert set(LLAMA_SHAPE) <= set(ARCHITECTURES)
    for model_type in ("llama", "mistral", "qwen2"):
        assert silent(model_type) == (3, 3, 4, 50, False)
    assert silent("llama", tie_word_embeddings=True)[-1]
    assert silent("qwen3") == (3, 3, 128, 50, False)
    assert silent("gemma3_text", "num_attention_heads", "vocab_size") == (8, 4, 256, 262_208, True)
    assert not silent("gemma3_text", tie_word_embeddings=False)[-1]


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("num_hidden_layers", 1024),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("num_attention_heads", 1 << 20),
        ("num_key_value_heads", 1 << 20),
        ("head_dim", 1 << 20),
        ("vocab_size", 1 << 24),
    ],
)
def test_a_number_is_whole_and_sensible(field: str, most: int) -> None:
    config = {**CONFIG, "head_dim": 4}
    read_dimensions({**config, field: most})
    read_dimensions({**config, field: 1})
    for value in (most + 1, 0, -1, 2.0, "2", True, [2]):
        with pytest.raises(CorruptCheckpoint, match=field):
            read_dimensions({**config, field: value})


@pytest.mark.parametrize("model_type", ["xlnet", None, 3, ["llama"]])
def test_other_architectures_are_refused(model_type: object) -> None:
    with pytest.raises(UnsupportedArchitecture, match="supported are: llama, mistral, "):
        read_dimensions({**CONFIG, "model_type": model_type})


def test_transformers_must_load_what_is_read() -> None:
    index = "model.safetensors.index.json"
    check_choice(["config.json", "model.safetensors", "shard-1.safetensors"], "model.safetensors", {})
    check_choice([index], index, {"transformers_weights": index})
    for names, config, told in (
        ([index, "adapter_config.json"], {}, "puts the adapter on the model"),
        ([index, "model.safetensors"], {"transformers_weights": "model.safetensors"}, "loads in place of"),
        ([index, "shard-00000-model-00001-of-00002.safetensors"], {}, "distributed checkpoint"),
    ):
        with pytest.raises(CorruptCheckpoint, match=told) as refused:
            check_choice(names, index, config)
        assert refused.value.hint


MARKS = [".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_tensor_that_only_a_quantized_checkpoint_has(mark: str) -> None:
    tensors = [("a.weight", "BF16"), (f"a{mark}", "F32"), ("b.qweight", "I32")]
    assert (quantized_tensor(tensors) or ("",))[0] == f"a{mark}"
    assert quantized_tensor([(f"a{mark}.b", "F32"), ("a.b", "F32")]) is None


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "I8", "U8", "F32", "F16", "BF16", "I32", "U16", "F64"])
def test_a_weight_of_a_narrow_dtype_is_quantized(dtype: str) -> None:
    narrow = dtype in {"F8_E4M3", "F8_E5M2", "F4", "I8", "U8"}
    found = quantized_tensor([("norm.weight", "F32"), ("a.weight", dtype)])
    assert (found is not None) is narrow
    if found is not None:
        assert found == ("a.weight", "an FP8 weight" if "F8" in dtype else f"a weight of the dtype {dtype}")
    assert quantized_tensor([("a.mask", dtype)]) is None


def test_links_are_followed_before_a_root_is_asked(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "root2"
    (root / "a" / "b").mkdir(parents=True)
    other.mkdir()
    (root / "out").symlink_to(other)
    (other / "in").symlink_to(root)
    assert lies_under(root, [root])
    assert lies_under(root / "a" / "b", [other, root])
    assert lies_under(other / "in" / "a", [root])
    for path in (other, root / "out", root / "a" / ".." / ".." / "root2", "/"):
        assert not lies_under(path, [root])
    assert not lies_under(root, [])
    assert lies_under(root, [Path("/")])
    check_links(root / "a", (root,))
    for place in (root / "a" / "x", root / "a" / "b" / "x"):
        place.symlink_to(other)
        with pytest.raises(SourceForbidden, match="x is a link out of the allowed folders"):
            check_links(root / "a", (root,))
        check_links(root / "a", (root, other))
        place.unlink()
