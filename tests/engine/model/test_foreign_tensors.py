"""Tensors beside a model's own, and parameters without any: transformers' choice where it gives the same model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from bitwright.errors import BitwrightError
from bitwright.events import WarningEvent
from tests.engine.conftest import run_job
from tests.engine.model.random_models import save_random_model

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
QUICK: dict[str, Any] = {"evaluation": None, "formats": ["merged"], "group_size": 16}
FIRST = "model.layers.0.self_attn.q_proj"


def changed(folder: Path, change: Change, config: Mapping[str, Any] | None = None, **shape: Any) -> Path:
    """A random llama whose stored tensors went through `change`, and config.json with these fields."""
    save_random_model(folder, "llama", **shape)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(dict(change(tensors)), folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    return folder


LEFT_OUT: dict[str, Change] = {
    "a value head": lambda t: t | {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    "a block after the last": lambda t: t | {"model.layers.4.eh_proj.weight": torch.ones(4, 4)},
    "a classifier": lambda t: t | {"score.weight": torch.ones(2, 32)},
}


@pytest.mark.parametrize("change", LEFT_OUT.values(), ids=LEFT_OUT)
def test_tensors_that_the_model_does_not_have_are_left_out_as_transformers_does(
    change: Change, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, lines = changed(tmp_path / "model", change), list[AttemptLine]()
    run_job(folder, tmp_path / "job", lines, bits=8, **QUICK)
    (warning,) = [w for w in lines if isinstance(w, WarningEvent) and w.code == "tensors_left_out"]
    foreign = sorted(change({}))
    assert all(name in warning.message for name in foreign)
    merged = tmp_path / "job" / "output" / "merged"
    assert not set(foreign) & set(load_file(merged / "model.safetensors")), "other loaders refuse what they do not know"
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (folder, merged))
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["mtp.layers.0.eh_proj.weight", "model.vision_tower.patch.weight"])
def test_other_parts_of_a_model_go_into_the_result_as_they_are(name: str, tmp_path: Path) -> None:
    part = torch.randn(4, 4).to(torch.bfloat16)
    folder, lines = changed(tmp_path / "model", lambda t: t | {name: part}), list[AttemptLine]()
    run_job(folder, tmp_path / "job", lines, bits=8, **QUICK | {"formats": ["merged", "compressed-tensors"]})
    assert not [w for w in lines if isinstance(w, WarningEvent) and w.code == "tensors_left_out"]
    for checkpoint in ("merged", "compressed-tensors"):
        found = load_file(tmp_path / "job" / "output" / checkpoint / "model.safetensors")[name]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, part)
    config = json.loads((tmp_path / "job" / "output" / "compressed-tensors" / "config.json").read_text())
    assert name.removesuffix(".weight") in config["quantization_config"]["ignore"]


def without(*names: str) -> Change:
    """All tensors but those whose name holds one of these."""
    return lambda t: {name: tensor for name, tensor in t.items() if not any(each in name for each in names)}


def prefixed(prefix: str) -> Change:
    """All names with a prefix."""
    return lambda t: {prefix + name: tensor for name, tensor in t.items()}


REFUSED: dict[str, tuple[Change, dict[str, Any], str, str, str]] = {
    "torch.compile": (prefixed("_orig_mod."), {}, "corrupt_checkpoint", "'_orig_mod.'", "torch.compile"),
    "data parallelism": (prefixed("module."), {}, "corrupt_checkpoint", "'module.'", "model.module"),
    "another wrapper": (prefixed("policy."), {}, "corrupt_checkpoint", "'policy.'", "removeprefix"),
    "peft": (
        lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(2, 32)},
        {},
        "unsupported_checkpoint",
        "unmerged adapter",
        "merge_and_unload",
    ),
    "a bias that is not computed": (
        lambda t: t | {f"{FIRST}.bias": torch.ones(32)},
        {},
        "corrupt_checkpoint",
        "compute without them",
        "attention_bias",
    ),
    "a norm that is not computed": (
        lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
        {},
        "corrupt_checkpoint",
        "q_norm",
        "config.json that was saved with these weights",
    ),
    "FP8": (
        lambda t: t | {f"{FIRST}.weight": t[f"{FIRST}.weight"].to(torch.float8_e4m3fn)},
        {},
        "unsupported_architecture",
        "FP8",
        "bfloat16",
    ),
    "FP8's scales alone": (
        lambda t: t | {f"{FIRST}.weight_scale_inv": torch.ones(1, 1)},
        {},
        "unsupported_architecture",
        "FP8",
        "16-bit checkpoint",
    ),
    "GPTQ": (
        lambda t: without(f"{FIRST}.weight")(t) | {f"{FIRST}.qweight": torch.ones(4, 32, dtype=torch.int32)},  # type: ignore[operator]
        {},
        "unsupported_architecture",
        "GPTQ",
        "16-bit checkpoint",
    ),
    "no head": (without("lm_head"), {}, "corrupt_checkpoint", "lm_head.weight", "tie_word_embeddings"),
    "fewer blocks": (without("layers.3."), {}, "corrupt_checkpoint", "9 parameters", "3 blocks"),
    "a lost tensor": (
        without("layers.1.mlp.up_proj"),
        {},
        "corrupt_checkpoint",
        "up_proj",
        "a file of it may be missing",
    ),
    "no biases": (lambda t: t, {"attention_bias": True}, "corrupt_checkpoint", "q_proj.bias", "attention_bias"),
    "another vocabulary": (lambda t: t, {"vocab_size": 60}, "corrupt_checkpoint", "60", "set vocab_size to 64"),
    "another width": (lambda t: t, {"intermediate_size": 32}, "corrupt_checkpoint", "32", "was saved with"),
}


@pytest.mark.parametrize(("change", "config", "code", "told", "way_out"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_another_model_is_refused_with_a_way_out(
    change: Change, config: dict[str, Any], code: str, told: str, way_out: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "model", change, config, tie_word_embeddings=False)
    with pytest.raises(BitwrightError) as caught:
        run_job(folder, tmp_path / "job", **QUICK)
    assert caught.value.code == code
    assert told in caught.value.detail
    assert way_out in str(caught.value.hint)
    assert str(tmp_path) not in f"{caught.value.detail} {caught.value.hint} {caught.value.value}"
