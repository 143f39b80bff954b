"""Exports of results with quantized embeddings and heads, of number formats, and with scales of a cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from tests.engine.conftest import run_job
from tests.engine.exports.checkpoints import assert_same, tensors
from tests.engine.exports.orders import export

UNIFORM = {"modules": {"embeddings": 4, "head": 4}}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one scheme": (UNIFORM, ["compressed-tensors", "gguf", "mlx", "merged"]),
    "one scheme, weights only": ({**UNIFORM, "weights_only": True}, ["compressed-tensors", "mlx"]),
    "embeddings alone": ({"modules": {"embeddings": 8}}, ["gguf", "mlx", "merged"]),
    "a head alone": ({"modules": {"head": 8}}, ["compressed-tensors", "gguf", "mlx"]),
    "types of llama.cpp": ({"scheme": "q5_1", "modules": {"embeddings": "q8_0"}}, ["gguf", "merged"]),
    "embeddings in FP8": ({"modules": {"embeddings": "fp8a16"}}, ["merged"]),
}


@pytest.fixture(scope="module")
def tied_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with its embeddings for its head."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def base_of(asked: dict[str, Any]) -> dict[str, Any]:
    """The request of the job in an export's order, as `run_job` asks for it."""
    quantization = {"method": "rtn", **({} if "scheme" in asked else {"bits": 4, "group_size": 32}), **asked}
    return {"quantization": quantization, "evaluation": None}


def exported(model: Path, folder: Path, formats: list[str], asked: dict[str, Any]) -> Any:
    """A job with all formats at once, and an export of one that has only its own; both are compared."""
    own = run_job(model, folder / "own", formats=formats, evaluation=None, **asked)
    base = run_job(model, folder / "base", formats=["native"], evaluation=None, **asked)
    native = folder / "base" / base.checkpoints["native"]
    report = export(native, folder / "work", formats, **base_of(asked)).report
    for name in formats:
        assert_same(folder / "work" / "output" / name, folder / "own" / own.checkpoints[name])
    assert report.size.bytes_files == {name: own.report.size.bytes_files[name] for name in formats}
    return report


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_matrices_outside_the_blocks_are_what_the_job_itself_writes(
    case: str, tied: bool, small_model: Path, tied_model: Path, tmp_path: Path
) -> None:
    asked, formats = CASES[case]
    exported(tied_model if tied else small_model, tmp_path, formats, asked)
    folder = tmp_path / "work" / "output" / "compressed-tensors"
    if "embeddings" in asked["modules"] and folder.exists():
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert {"lm_head.weight_packed", "model.embed_tokens.weight_packed"} <= tensors(folder).keys()


def test_a_head_that_stays_apart_is_refused_beside_packed_embeddings(small_model: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"modules": {"embeddings": 4}}
    base = run_job(small_model, tmp_path / "base", formats=["native"], evaluation=None, **asked)
    native = tmp_path / "base" / base.checkpoints["native"]
    with pytest.raises(FormatCannotHold, match="head is a matrix of its own"):
        export(native, tmp_path / "work", ["compressed-tensors"], **base_of(asked))


@pytest.mark.parametrize(("name", "formats"), [("nvfp4", ["merged"]), ("fp8", []), ("mxfp4a16", ["mlx"])], ids=str)
def test_number_formats_and_scales_of_a_cache_are_what_the_job_itself_writes(
    name: str, formats: list[str], small_model: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"scheme": name, "kv_cache": "fp8"}
    report = exported(small_model, tmp_path, ["compressed-tensors", *formats], asked)
    folder = tmp_path / "work" / "output" / "compressed-tensors"
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["num_bits"] == 8
    scales = [key for key in tensors(folder) if key.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 6
    told = [warning for warning in report.warnings if "key-value cache" in warning]
    assert [warning.partition(":")[0] for warning in told] == formats
    for other in formats:
        assert not [key for key in tensors(tmp_path / "work" / "output" / other) if key.endswith("_scale")]


def test_a_lost_scale_of_a_cache_is_named(small_model: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"scheme": "fp8", "kv_cache": "fp8"}
    base = run_job(small_model, tmp_path / "base", formats=["native"], evaluation=None, **asked)
    native = tmp_path / "base" / base.checkpoints["native"]
    stored = load_file(native / "weights.safetensors")
    stored["model.layers.1.self_attn.v_scale"] = torch.zeros(1)
    save_file(stored, native / "weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.self_attn\.v_scale should be one positive number"):
        export(native, tmp_path / "work", ["compressed-tensors"], **base_of(asked))
