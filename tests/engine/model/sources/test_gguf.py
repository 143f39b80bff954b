"""GGUF files: numbers as gguf-py reads them, names, rows and configuration as transformers' own loader."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from app.domain.inputs.quantized.gguf_header import BLOCKS
from bitwright.errors import UnsupportedCheckpoint
from tests.engine.model.sources.gguf_files import MODELS, random_blocks, random_model, write_gguf
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.sources.gguf import GgufTensor, gguf_header

UNREAD = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"}
"""Types that gguf-py has no numbers for, or that no weight has."""


def test_types_have_the_blocks_of_gguf_py() -> None:
    assert {name for name, _, _ in BLOCKS.values()} == {kind.name for kind in GGML_QUANT_SIZES} - UNREAD
    for number, (name, numbers, size) in BLOCKS.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (name, (numbers, size))


@pytest.mark.parametrize("number", sorted(BLOCKS), ids=lambda number: BLOCKS[number][0])
def test_every_type_is_what_gguf_py_makes_of_it(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.model.sources.gguf.CHUNK_NUMBERS", 3 * 512)  # three rows at a time
    name, numbers, size = BLOCKS[number]
    kind = GGMLQuantizationType(number)
    octets = random_blocks(kind, 7, 512 // numbers, size)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a.weight", octets, raw_dtype=kind) if numbers > 1 or name == "BF16" else writer.add_tensor(
        "a.weight", octets.view(np.float32 if name == "F32" else np.float16)
    )
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    entry = gguf_header(tmp_path / "a.gguf").tensors["a.weight"]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        ours = GgufTensor(tmp_path / "a.gguf", entry, entry.shape, torch.float32).make(lambda *_: torch.empty(0))
        (tensor,) = GGUFReader(tmp_path / "a.gguf").tensors
        wanted = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
    assert ours.shape == (7, 512)
    assert torch.equal(ours.view(torch.int32), wanted.reshape(7, 512).view(torch.int32))


def opened(folder: Path, case: str, **options: Any) -> Checkpoint:
    """A random model's file, as a checkpoint."""
    folder.mkdir(exist_ok=True)
    write_gguf(folder / "model.gguf", case, random_model(case), **options)
    return Checkpoint.open(folder)


def loaded(folder: Path, case: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model that transformers loads from a folder's file, with its own configuration: it reads not all of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=random_model(case).config,
            gguf_file="model.gguf",
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
        )


@pytest.mark.parametrize("case", MODELS)
def test_a_file_is_the_model_that_transformers_loads_from_it(case: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "model", case)
    theirs = loaded(tmp_path / "model", case, torch.float32)
    state = theirs.state_dict()
    read = {name: checkpoint.read(name) for name in checkpoint.tensors}
    experts = {name for name in read if ".experts." in name}
    for name in sorted(read.keys() - experts):
        assert torch.equal(read[name], state[name]), name
    for block in range(2) if experts else ():
        prefix = f"model.layers.{block}.mlp.experts"
        gates, ups, downs = (
            torch.stack([read[f"{prefix}.{expert}.{which}_proj.weight"] for expert in range(3)])
            for which in ("gate", "up", "down")
        )
        assert torch.equal(torch.cat([gates, ups], 1), state[f"{prefix}.gate_up_proj"])
        assert torch.equal(downs, state[f"{prefix}.down_proj"])
    tied = {"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set()
    fused = {name for name in state if ".experts." in name}
    assert read.keys() - experts == state.keys() - tied - fused


@pytest.mark.parametrize("case", MODELS)
def test_a_file_has_the_configuration_of_the_model(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    ours = AutoConfig.for_model(**opened(tmp_path / "model", case).config).to_dict()
    wanted = model.config.to_dict()
    ignored = {"dtype", "architectures", "_name_or_path", "pad_token_id", "bos_token_id", "eos_token_id"}
    if case == "phi3":
        ignored |= {"head_dim", "pad_token_id"}
    different = {name for name in wanted if ours.get(name) != wanted[name]} - ignored
    assert different == set()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16", "F16"])
def test_logits_of_a_quantized_file_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "model", "llama", kind=GGMLQuantizationType[kind])
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    assert checkpoint.config["dtype"] == str(dtype).removeprefix("torch.")
    assert all(checkpoint.read(name).dtype == dtype for name in checkpoint.tensors)
    theirs = loaded(tmp_path / "model", "llama", dtype)
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), theirs.state_dict()[name]), name


def test_llama_3s_scaling_is_found_in_its_factors_and_nothing_else_is(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama")
    config = AutoConfig.for_model(**(model.config.to_dict() | {"rope_parameters": scaling}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 16, 2).float() / 16)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    for factors, said in ((plain / scaled, True), (torch.full((8,), 4.0), False)):
        folder = tmp_path / str(said)
        folder.mkdir()
        write_gguf(folder / "model.gguf", "llama", model, {"rope_freqs.weight": factors})
        if said:
            found = AutoConfig.for_model(**Checkpoint.open(folder).config).rope_parameters
            assert found == scaling
        else:
            with pytest.raises(UnsupportedCheckpoint, match="Llama 3's scaling"):
                Checkpoint.open(folder)


def test_linear_scaling_is_said_and_other_scaling_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "model", "llama", **{"rope.scaling.factor": 4.0})
    assert AutoConfig.for_model(**checkpoint.config).rope_parameters == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10_000.0,
    }


def test_the_folder_that_is_presented_has_all_but_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "LICENSE").write_text("free")
    checkpoint = opened(tmp_path / "model", "qwen2")
    assert sorted(file.name for file in checkpoint.folder.iterdir()) == ["LICENSE", "config.json"]
    assert json.loads((checkpoint.folder / "config.json").read_text())["model_type"] == "qwen2"
    assert checkpoint.presented is not None
    assert checkpoint.presented.what == "a GGUF file (F32)"
    first = checkpoint.digest("abc")
    assert Checkpoint.open(tmp_path / "model").digest("abc") == first
    write_gguf(tmp_path / "model" / "model.gguf", "qwen2", random_model("qwen2"), context_length=64)
    assert Checkpoint.open(tmp_path / "model").digest("abc") != first


def test_a_tensor_that_no_parameter_takes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    more = {"blk.1.attn_sinks.weight": torch.ones(4)}
    write_gguf(tmp_path / "model" / "model.gguf", "qwen3", random_model("qwen3"), more)
    with pytest.raises(UnsupportedCheckpoint, match=r"blk\.1\.attn_sinks\.weight") as refused:
        Checkpoint.open(tmp_path / "model")
    assert "-GGUF" in str(refused.value.hint)
