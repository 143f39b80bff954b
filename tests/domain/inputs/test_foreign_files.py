"""Recognition, by names alone, of files in a folder, an upload or a repository that are no checkpoint."""

import pytest

from app.domain.inputs.foreign_files import foreign_files
from bitwright.errors import UnsafeCheckpoint, UnsupportedCheckpoint

TOKENS = ["tokenizer.json", "tokenizer_config.json", "README.md"]
FOREIGN: list[tuple[list[str], str, str]] = [
    (["model-Q4_K_M.gguf", "model-Q8_0.gguf"], "GGUF", "the one file that is to be read"),
    (["config.json", "a.Q8_0.gguf", "b.gguf"], "GGUF", "the model that it was made from"),
    (["config.json", "BF16/model.gguf"], "GGUF", "a folder or an upload with the one file"),
    (["mmproj-model.gguf"], "GGUF", "no vision tower"),
    (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter", "merge_and_unload"),
    (["adapter_config.json", "adapter_model.bin"], "PEFT adapter", "base"),
    (["adapter_config.json", "config.json", "adapter_model.safetensors"], "PEFT adapter", "base"),
    (["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"], "diffusers", "causal"),
    (["params.json", "consolidated.safetensors", "tekken.json"], "own layout", "convert_mistral"),
    (["config.json", "onnx/model.onnx"], "ONNX", "exported from"),
    (["config.json", "weights.npz"], "MLX", "converted from"),
    (["config.json", "tf_model.h5"], "TensorFlow", "from_tf"),
    (["config.json", "flax_model.msgpack"], "Flax", "from_flax"),
    (["openvino_model.xml", "openvino_model.bin", "config.json"], "OpenVINO", "exported from"),
    (["rank0.engine", "config.json"], "TensorRT", "built from"),
    (["m.nemo"], "NeMo", "convert"),
    (["config.json", "model-4bit.safetensors"], "neither model.safetensors", "model.safetensors.index.json"),
    (["config.json", "fp16/model.safetensors"], "another folder", "that folder's files"),
]


@pytest.mark.parametrize(("names", "what", "way_out"), FOREIGN, ids=[row[1] for row in FOREIGN])
def test_files_of_another_kind_are_named(names: list[str], what: str, way_out: str) -> None:
    found = foreign_files([*names, *TOKENS])
    assert found is not None
    error = found.refusal("model")
    assert isinstance(error, UnsupportedCheckpoint)
    assert what in error.detail
    assert way_out in str(error.hint)
    assert "pickle" not in error.detail


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "pytorch_model.bin"],
        ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ["config.json", "model.pt"],
        ["config.json", "model.ckpt"],
        ["params.json", "consolidated.00.pth"],
        ["original/params.json", "original/consolidated.00.pth"],
    ],
)
def test_pickled_weights_are_unsafe_and_say_so(names: list[str]) -> None:
    found = foreign_files(names)
    assert found is not None
    assert isinstance(found.refusal("model"), UnsafeCheckpoint)


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors"],
        ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "model.gguf"],
        ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "original/c.pth"],
        ["config.json", "model.safetensors", "adapter_config.json"],
        ["config.json", "tokenizer.json"],
        ["model-Q4_K_M.gguf"],
        ["config.json", "model.GGUF", "mmproj-model-f16.gguf"],
        ["rows.jsonl"],
        [],
    ],
)
def test_a_checkpoint_and_nothing_known_are_left_to_others(names: list[str]) -> None:
    assert foreign_files(names) is None


@pytest.mark.parametrize(
    "names",
    [
        ["z.gguf", "m.gguf", "a.gguf"],
        ["z.bin", "a.bin", "m.bin"],
        ["config.json", "z.safetensors", "a.safetensors", "m.safetensors"],
        ["config.json", "x/z/model.safetensors", "x/a/model.safetensors"],
    ],
)
def test_of_several_files_the_first_by_name_is_shown(names: list[str]) -> None:
    found = foreign_files(names)
    assert found is not None
    assert found.refusal("model").value == min(name for name in names if name != "config.json").rpartition("/")[2]
