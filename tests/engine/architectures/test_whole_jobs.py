"""Whole jobs on types of each kind, and faults that must be seen: a tensor of another part changed or lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.architectures.configurations import save_random
from tests.engine.architectures.proofs import deviation, proved_job, save_tokenizer, touched

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 0.005
MTP = "model.layers.4.eh_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The weights of a folder with a change made in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def wrapper_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of images and text, and its merged checkpoint."""
    place = tmp_path_factory.mktemp("wrapper")
    save_random(place / "model", "qwen2_vl")
    save_tokenizer(place / "model")
    report, ids = proved_job(place / "model", place / "job", method="rtn", formats=["merged", "compressed-tensors"])
    for name in ("merged", "compressed-tensors", "native"):
        off, keys = deviation(place / "job" / "output" / name, report, ids)
        assert (off < CLOSE, keys) == (True, []), name
    return place / "model", place / "job" / "output" / "merged"


def test_nothing_outside_the_text_tower_is_touched(wrapper_job: tuple[Path, Path]) -> None:
    model, merged = wrapper_job
    assert any("visual" in name for name in load_file(merged / "model.safetensors"))
    assert touched(model, merged) == []


def test_a_changed_vision_tensor_is_seen(wrapper_job: tuple[Path, Path], tmp_path: Path) -> None:
    model, merged = wrapper_job
    shutil.copytree(merged, tmp_path / "merged")
    name = next(name for name in load_file(merged / "model.safetensors") if "visual" in name)
    rewrite(tmp_path / "merged", lambda tensors: tensors[name].view(-1)[:1].mul_(1.001))
    assert touched(model, tmp_path / "merged") == [name]


def test_every_linear_of_the_vision_tower_is_ignored_by_both_of_its_names(wrapper_job: tuple[Path, Path]) -> None:
    _, merged = wrapper_job
    config = json.loads((merged.parent / "compressed-tensors" / "config.json").read_text())
    ignored = set(config["quantization_config"]["ignore"])
    assert {"model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"} <= ignored


def test_a_block_that_predicts_further_tokens_goes_along_and_a_lost_one_is_seen(tmp_path: Path) -> None:
    save_random(tmp_path / "model", "deepseek_v3")
    save_tokenizer(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({MTP: torch.randn(64, 128)}))
    proved_job(tmp_path / "model", tmp_path / "job", method="rtn", formats=["merged"])
    merged = tmp_path / "job" / "output" / "merged"
    assert touched(tmp_path / "model", merged) == []
    rewrite(merged, lambda tensors: tensors.pop(MTP))
    assert touched(tmp_path / "model", merged) == [MTP]


@pytest.mark.parametrize("model_type", ["bloom", "falcon_h1", "qwen3_5", "gpt_oss"])
def test_a_tuned_checkpoint_is_what_the_report_says(model_type: str, tmp_path: Path) -> None:
    save_random(tmp_path / "model", model_type)
    save_tokenizer(tmp_path / "model")
    tuned = {"method": "signround", "steps": 4, "batch_size": 4, "formats": ["merged"]}
    report, ids = proved_job(tmp_path / "model", tmp_path / "job", **tuned)
    off, keys = deviation(tmp_path / "job" / "output" / "merged", report, ids)
    assert (off < CLOSE, keys) == (True, [])
    assert touched(tmp_path / "model", tmp_path / "job" / "output" / "merged") == []
