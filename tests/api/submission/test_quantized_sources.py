"""Quantized checkpoints and GGUF files as sources: judged by their headers when a job is posted, without torch."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.api.checkpoints import with_header, write_checkpoint
from tests.api.conftest import SHORTHAND, Api, problem
from tests.domain.inputs.quantized.gguf_bytes import ARCHITECTURE, File, Tensor, array, number, text

DRY = "/v1/jobs?dry_run=true"
SIZES = {"F8_E4M3": 1, "F32": 4, "BF16": 2, "I32": 4}
LINEAR = "model.layers.0.mlp.down_proj"


def stored(tensors: dict[str, tuple[str, tuple[int, int]]]) -> bytes:
    """A file of zeros with tensors of these dtypes."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype] * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return with_header(header, position)


def gguf_file(**changes: Any) -> bytes:
    """A llama whose embeddings are in Q8_0."""
    numbers = {
        b"llama.block_count": 2,
        b"llama.context_length": 128,
        b"llama.embedding_length": 64,
        b"llama.feed_forward_length": 192,
        b"llama.attention.head_count": 4,
        b"llama.attention.head_count_kv": 2,
    }
    pairs = [ARCHITECTURE, number(b"llama.attention.layer_norm_rms_epsilon", 6, 1e-5)]
    pairs += [number(key, 4, value) for key, value in numbers.items()]
    pairs.append(array(b"tokenizer.ggml.tokens", 8, 2, text(b"a") + text(b"b")))
    embeddings = Tensor(b"token_embd.weight", sides=(64, 128), kind=8)
    norm = Tensor(b"output_norm.weight", sides=(64,), offset=8704)
    return File(pairs=pairs, tensors=(embeddings, norm), data=8704 + 256).but(**changes).bytes()


def dry_run(api: Api, folder: Path) -> Any:
    """The answer to a dry run of a job from a folder."""
    return api.client.post(DRY, json={**SHORTHAND, "group_size": 32, "model": str(folder)})


def quantized_folder(api: Api, settings: object, tensors: dict[str, tuple[str, tuple[int, int]]]) -> Path:
    """A checkpoint with this quantization_config."""
    folder = write_checkpoint(api.folder / "models" / "quantized", {"quantization_config": settings})
    (folder / "model.safetensors").write_bytes(stored(tensors))
    return folder


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_a_dry_run_says_what_the_source_is_and_counts_its_weights(api: Api) -> None:
    tensors = {f"{LINEAR}.weight": ("F8_E4M3", (192, 128)), f"{LINEAR}.weight_scale_inv": ("F32", (2, 1))}
    answer = dry_run(api, quantized_folder(api, FP8, tensors))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert any("the source is FP8" in warning for warning in found["warnings"])
    assert found["estimates"]["weights"] == 192 * 128
    assert found["estimates"]["bytes_original"] == 192 * 128 * 2


def test_parts_that_do_not_fit_are_refused_when_the_job_is_posted(api: Api) -> None:
    tensors = {f"{LINEAR}.weight": ("F8_E4M3", (192, 128)), f"{LINEAR}.weight_scale_inv": ("F32", (3, 1))}
    refused = problem(dry_run(api, quantized_folder(api, FP8, tensors)), 422, "corrupt_checkpoint")
    assert f"{LINEAR}.weight_scale_inv" in str(refused["detail"])
    assert "send the checkpoint again" in str(refused["detail"])


@pytest.mark.parametrize("method", ["modelopt", "torchao", "hqq", "exl3", "quip", 7, None])
def test_layouts_that_are_not_read_are_refused_by_name(api: Api, method: object) -> None:
    folder = write_checkpoint(api.folder / "models" / "given", {"quantization_config": {"quant_method": method}})
    refused = problem(dry_run(api, folder), 422, "unsupported_architecture")
    assert repr(method) in str(refused["detail"])
    assert "quantized already" in str(refused["detail"])
    ways_out = ("bfloat16", "model that it was made from", "compressed-tensors")
    assert any(way in str(refused["detail"]) for way in ways_out)


def test_mlx_is_refused_by_name(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "given", {"quantization": {"bits": 4, "group_size": 64}})
    assert "MLX" in str(problem(dry_run(api, folder), 422, "unsupported_architecture")["detail"])


def test_a_folder_with_one_gguf_file_is_a_model(api: Api) -> None:
    folder = api.folder / "models" / "gguf"
    folder.mkdir()
    (folder / "model.Q8_0.gguf").write_bytes(gguf_file())
    answer = dry_run(api, folder)
    assert answer.status_code == 200, answer.text
    assert any("a GGUF file (Q8_0, F32)" in warning for warning in answer.json()["warnings"])
    assert answer.json()["estimates"]["weights"] == 128 * 64 + 64
    assert not any("no tokenizer" in warning for warning in answer.json()["warnings"])

    (folder / "model.Q8_0.gguf").write_bytes(gguf_file(data=8704))
    refused = problem(dry_run(api, folder), 422, "corrupt_checkpoint")
    assert "output_norm.weight" in str(refused["detail"])
    mamba = text(b"general.architecture") + struct.pack("<I", 8) + text(b"mamba")
    (folder / "model.Q8_0.gguf").write_bytes(gguf_file(pairs=(mamba,)))
    refused = problem(dry_run(api, folder), 422, "unsupported_checkpoint")
    assert "'mamba'; read are llama, qwen2" in str(refused["detail"])


def test_a_gguf_file_may_be_sent(api: Api) -> None:
    content = gguf_file()
    files = [{"name": "m.gguf", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    made = api.client.post("/v1/uploads", json={"files": files})
    assert made.status_code == 201, made.text
    upload = made.json()["id"]
    assert api.client.put(f"/v1/uploads/{upload}/files/m.gguf", content=content).status_code == 204
    assert api.client.post(f"/v1/uploads/{upload}/complete").status_code == 200
    answer = api.client.post(DRY, json={**SHORTHAND, "group_size": 32, "model": upload})
    assert answer.status_code == 200, answer.text
    assert any("a GGUF file (Q8_0, F32)" in warning for warning in answer.json()["warnings"])
