"""Errors and hints for sources that are no checkpoint, folders that may not be read, requests that disappoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.inputs.architectures import read_dimensions
from tests.api.checkpoints import CONFIG, safetensors, write_checkpoint
from tests.api.conftest import SHORTHAND, Api, problem

DRY = "/v1/jobs?dry_run=true"


def folder_of(api: Api, files: dict[str, bytes]) -> Path:
    """A folder under the root with these files."""
    folder = api.folder / "models" / "given"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors({"a": (2, 2)})}
SOURCES: list[tuple[dict[str, bytes], str, str]] = [
    ({"m.Q4_K_M.gguf": b"GGUF", "m.Q8_0.gguf": b"GGUF"}, "unsupported_checkpoint", "GGUF"),
    ({"config.json": b"{}", "mmproj.gguf": b"GGUF"}, "unsupported_checkpoint", "GGUF"),
    (ADAPTER, "unsupported_checkpoint", "merge_and_unload"),
    ({"config.json": b"{}", "model.onnx": b""}, "unsupported_checkpoint", "ONNX"),
    ({"config.json": b"{}", "pytorch_model.bin": b""}, "unsafe_checkpoint", "save_pretrained"),
    ({"params.json": b"{}", "consolidated.safetensors": b""}, "unsupported_checkpoint", "convert_mistral"),
]


@pytest.mark.parametrize(("files", "code", "told"), SOURCES, ids=[", ".join(row[0]) for row in SOURCES])
def test_a_source_of_another_kind_is_named_wherever_it_comes_from(
    api: Api, files: dict[str, bytes], code: str, told: str
) -> None:
    local = api.client.post(DRY, json={**SHORTHAND, "model": str(folder_of(api, files))})
    assert told in problem(local, 422, code)["detail"]  # type: ignore[operator]
    body = {"files": [{"name": name, "size": len(data), "sha256": "0" * 64} for name, data in files.items()]}
    sent = problem(api.client.post("/v1/uploads", json=body), 422, code)
    if code == "unsupported_checkpoint":
        assert told in f"{sent['detail']} {sent['hint']}"


def test_a_file_as_a_model_is_named(api: Api) -> None:
    folder = folder_of(api, {"m.gguf": b"GGUF", "model.safetensors": b""})
    for name in ("m.gguf", "model.safetensors"):
        found = problem(api.client.post(DRY, json={**SHORTHAND, "model": str(folder / name)}), 422, "source_not_found")
        assert "name the folder" in str(found["detail"])
        assert "one GGUF file" in str(found["detail"])


def test_a_folder_that_may_not_be_read_names_both_ways_and_no_folder_of_the_server(api: Api) -> None:
    for path in ("/etc", str(api.folder)):
        found = problem(api.client.post(DRY, json={**SHORTHAND, "model": path}), 422, "source_forbidden")
        told = json.dumps({**found, "value": None, "errors": None}).replace(path + " is", "")
        assert "--model-root" in told
        assert "bitwright upload" in told
        assert str(api.folder / "models") not in told
    relative = problem(api.client.post(DRY, json={**SHORTHAND, "model": "./here"}), 422, "source_forbidden")
    assert "bitwright upload" in str(relative["detail"])


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"model.layers.0.mlp.down_proj.weight": "F8_E4M3"}, "FP8"),
        ({"model.layers.0.mlp.down_proj.qweight": "I32"}, "GPTQ"),
        ({"model.layers.0.mlp.down_proj.weight": "U8"}, "U8"),
    ],
)
def test_weights_that_are_quantized_already_are_seen_at_once(api: Api, tensors: dict[str, str], told: str) -> None:
    folder = write_checkpoint(api.folder / "models" / "fp8")
    header, position = {}, 0
    for name, dtype in tensors.items():
        size = 4 * (4 if dtype == "I32" else 1)
        header[name] = {"dtype": dtype, "shape": [2, 2], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))
    found = problem(api.client.post(DRY, json={**SHORTHAND, "model": str(folder)}), 422, "unsupported_architecture")
    assert told in str(found["detail"])
    assert "16-bit" in str(found["detail"])


def small_checkpoint(api: Api, *, tied: bool = False) -> Path:
    folder = api.folder / "models" / ("tied" if tied else "small")
    if not folder.exists():
        write_checkpoint(folder, {"tie_word_embeddings": tied})
        shapes = {f"{name}.weight": shape for name, shape in read_dimensions(CONFIG).linears().items()}
        outer = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
        shapes |= {f"{name}.weight": (128, 64) for name in outer}
        (folder / "model.safetensors").write_bytes(safetensors(shapes))
    return folder


def dry_run(api: Api, *, tied: bool = False, **fields: Any) -> dict[str, Any]:
    """Estimates and warnings of a job on a small checkpoint."""
    folder = small_checkpoint(api, tied=tied)
    scheme = {} if "quantization" in fields else {"method": "rtn", "group_size": 32}
    answer = api.client.post(DRY, json={"model": str(folder), **scheme, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def told_of(found: dict[str, Any], field: str) -> list[str]:
    """The warnings about a field."""
    return [warning for warning in found["warnings"] if warning.startswith(field)]


def test_a_rank_that_cannot_be_reached_is_told_with_the_counts(api: Api) -> None:
    tuned = {"dataset": "builtin"}
    found = dry_run(api, method="qa-hira", rank=16, finetune=tuned)
    lora = dry_run(api, method="qlora", rank=16, finetune=tuned)
    (warning,) = told_of(found, "adapter.rank")
    assert f"{found['estimates']['adapter_parameters']:,} trained parameters" in warning
    assert f"a LoRA of that rank has {lora['estimates']['adapter_parameters']:,}" in warning
    assert found["estimates"]["adapter_parameters"] < lora["estimates"]["adapter_parameters"]
    assert told_of(lora, "adapter.rank") == []
    assert told_of(dry_run(api, method="q-bara", rank=2, finetune=tuned), "adapter.rank") == []
    assert "at most rank 32" in told_of(dry_run(api, method="qlora", rank=64, finetune=tuned), "adapter.rank")[0]
    assert "at most rank 2 " in told_of(dry_run(api, method="qa-lora", rank=4, finetune=tuned), "adapter.rank")[0]
    assert told_of(dry_run(api, method="qa-lora", rank=2, finetune=tuned), "adapter.rank") == []
    assert "at most rank 32" in told_of(dry_run(api, method="loftq", rank=64, formats=["merged"]), "rank")[0]


def test_starved_calibration_is_told(api: Api) -> None:
    few = {"num_samples": 32, "sequence_length": 2048}
    (warning,) = told_of(dry_run(api, method="gptq", calibration=few), "calibration")
    assert "65,536 tokens" in warning
    assert "262,144" in warning
    assert told_of(dry_run(api, method="gptq", calibration={**few, "num_samples": 33}), "calibration") == []
    assert told_of(dry_run(api, method="rtn", calibration=few), "calibration") == [], "it reads none"
    light = {"num_samples": 32, "sequence_length": 512}
    assert (
        "65,536 that" in told_of(dry_run(api, method="omniquant", preset="light", calibration=light), "calibration")[0]
    )


def test_a_quantized_head_is_in_the_estimates(api: Api) -> None:
    without = dry_run(api)["estimates"]
    with_head = dry_run(api, quantization={"method": "rtn", "group_size": 32, "modules": {"ignore": []}})
    # 128 x 64 weights of 4 bits and a 16-bit scale for 32 of them.
    assert with_head["estimates"]["weights_quantized"] == without["weights_quantized"] + 128 * 64
    assert without["bytes_checkpoint"] - with_head["estimates"]["bytes_checkpoint"] == 128 * 64 * (16 - 4.5) / 8


def test_a_missing_tokenizer_is_told_with_who_needs_it(api: Api) -> None:
    dry_run(api)
    (api.folder / "models" / "small" / "tokenizer.json").unlink()
    assert "evaluation needs: add tokenizer.json" in told_of(dry_run(api), "model")[0]
    assert "none goes with the result" in told_of(dry_run(api, evaluation=None), "model")[0]
    assert "calibration and evaluation" in told_of(dry_run(api, method="gptq"), "model")[0]


def test_a_head_stored_apart_from_its_embeddings_is_told_with_its_bytes(api: Api) -> None:
    rules = {"method": "rtn", "group_size": 32, "modules": {"head": 4}}
    found = dry_run(api, quantization=rules, tied=True, formats=["merged"])
    plain = dry_run(api, tied=True, formats=["merged"])["estimates"]
    (warning,) = told_of(found, "quantization.modules.head")
    assert "tie_word_embeddings becomes false" in warning
    added = 128 * 64 * 4.5 / 8
    assert f"{added / 1e6:.1f} MB more" in warning
    assert found["estimates"]["bytes_checkpoint"] - plain["bytes_checkpoint"] == added
    files, before = found["estimates"]["bytes_files"], plain["bytes_files"]
    assert files["native"] - before["native"] == pytest.approx(added, abs=600)
    assert files["merged"] - before["merged"] == pytest.approx(128 * 64 * 2, abs=300)


def test_a_tied_matrix_stored_twice_is_told(api: Api) -> None:
    rules = {"method": "rtn", "group_size": 32, "modules": {"embeddings": 4}}
    found = dry_run(api, quantization=rules, tied=True, formats=["compressed-tensors"])
    told = told_of(found, "formats.0")
    assert [("stores the matrix of head and embeddings twice" in warning) for warning in told] == [True]
    files = found["estimates"]["bytes_files"]
    assert files["compressed-tensors"] - files["native"] == pytest.approx(128 * 64 * 4.5 / 8, abs=600)
    assert any("with embeddings of 4 bits" in warning and "vllm" in warning for warning in found["warnings"])


WIDE = {"bits": 4, "group_size": 48}
RULES = "quantization.modules"


@pytest.mark.parametrize(
    ("tied", "modules", "formats", "field", "code"),
    [
        (False, {"embeddings": 4}, ["compressed-tensors"], "formats.0", "format_cannot_hold"),
        (True, {"embeddings": 4, "head": 8}, ["native"], "quantization.modules.head", "invalid_request"),
        (True, {"ignore": []}, ["native"], "quantization.modules.ignore", "invalid_request"),
        (True, {"embeddings": WIDE}, ["native"], f"{RULES}.embeddings.group_size", "group_size_does_not_divide"),
        (False, {"head": WIDE}, ["native"], f"{RULES}.head.group_size", "group_size_does_not_divide"),
    ],
)
def test_what_a_model_cannot_have_is_refused_when_it_is_submitted(
    api: Api, tied: bool, modules: dict[str, Any], formats: list[str], field: str, code: str
) -> None:
    body = {
        "model": str(small_checkpoint(api, tied=tied)),
        "quantization": {"method": "rtn", "group_size": 32, "modules": modules},
        "formats": formats,
    }
    answer = api.client.post(DRY, json=body)
    assert answer.status_code == 422
    assert [(each["field"], each["code"]) for each in answer.json()["errors"]] == [(field, code)]
