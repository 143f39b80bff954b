"""The mixes against llama.cpp's own choice: its library quantizes a file of zeros, and the types are read from it."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from app.domain.methods.block_presets import MIXES, BlockPreset, MixFacts, block_types_of
from tests.engine.ships.llama_cpp import quantize

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp")]


def write_model(
    file: Path, layers: int, heads: int, grouped: int, experts: int, tied: bool, down: int
) -> dict[str, int]:
    """A file of zeros with the matrices of a Llama; their columns by name."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(down)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // grouped)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(256 // heads)
    writer.add_vocab_size(32)
    columns = {"token_embd.weight": 256} | ({} if tied else {"output.weight": 256})
    rows = {"ffn_up": down, "ffn_gate": down, "attn_k": 256 // grouped, "attn_v": 256 // grouped}
    suffix = "_exps" if experts else ""
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            columns[f"blk.{layer}.{part}.weight"] = 256
        for part in ("ffn_up", "ffn_gate", "ffn_down"):
            columns[f"blk.{layer}.{part}{suffix}.weight"] = down if part == "ffn_down" else 256
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for name, width in columns.items():
        part = name.split(".")[2] if name.startswith("blk") else ""
        count = 32 if not part else rows.get(part.removesuffix("_exps"), 256)
        shape = (experts, count, width) if part.endswith("_exps") else (count, width)
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return columns


@pytest.mark.parametrize(
    ("layers", "grouped", "experts", "tied", "down"),
    [(16, 2, 0, False, 512), (17, 4, 0, True, 320), (33, 1, 0, False, 256), (9, 4, 8, False, 256)],
)
@pytest.mark.parametrize("preset", BlockPreset)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(
    preset: BlockPreset, layers: int, grouped: int, experts: int, tied: bool, down: int, tmp_path: Path
) -> None:
    columns = write_model(tmp_path / "zeros.gguf", layers, 4, grouped, experts, tied, down)
    quantize(Path(FOLDER), tmp_path / "zeros.gguf", tmp_path / "mixed.gguf", MIXES[preset].number)
    tensors = gguf.GGUFReader(tmp_path / "mixed.gguf").tensors
    theirs = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
    ours = block_types_of(preset, MixFacts(layers, grouped, experts, tied), columns)
    assert {name: theirs[name] for name in ours} == ours
