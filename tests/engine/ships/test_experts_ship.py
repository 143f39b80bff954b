"""Checkpoints of mixtures of experts: the source's names and layout, and the same numbers whoever loads them."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.errors import FormatCannotHold
from tests.engine.architectures.proofs import save_tokenizer
from tests.engine.conftest import run_job
from tests.engine.model.families import save_small_model
from tests.engine.model.loading import loader
from workers.formats import checkpoint as checkpoint_writer
from workers.formats.stored_linear import StoredPart

IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(2))
QUICK: dict[str, Any] = {"bits": 4, "group_size": 8, "evaluation": None}
pytestmark = pytest.mark.filterwarnings("ignore")


def source(folder: Path, family: str, *, fused: bool = False) -> Path:
    model = save_small_model(folder, family, vocab_size=300, dtype=torch.bfloat16)
    if fused:
        stored = {n: t.clone() for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for file in tokenizer_folder().iterdir():
        shutil.copy(file, folder)
    return folder


@cache
def tokenizer_folder() -> Path:
    """A tokenizer, trained once."""
    folder = Path(tempfile.mkdtemp())
    save_tokenizer(folder)
    return folder


def files(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.config._experts_implementation = "eager"
    found: Tensor = model(IDS, use_cache=False).logits
    return found


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


KEPT = ("norm", "embed", "router", ".gate.", "bias", "sinks", "conv1d", "A_log", "shared_expert_gate", "lm_head")


def wrongly_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Tensors that are not for quantizing and differ."""
    changed = (name for name in before if not torch.equal(before[name], after[name]))
    return [name for name in changed if any(word in name for word in KEPT)]


PACKED = ("qwen3_moe", "phimoe", "deepseek_v3", "qwen3_5_moe_text")
"""Whose experts transformers merges from packed ones."""


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("phimoe", False),
        ("qwen3_5_moe_text", True),
        ("gpt_oss", True),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in ("qwen3_moe", "deepseek_v3")),
        *(pytest.param(family, True, marks=pytest.mark.slow) for family in ("llama4_text", "granitemoe")),
    ],
)
def test_every_checkpoint_has_the_sources_names_and_the_same_numbers(family: str, fused: bool, tmp_path: Path) -> None:
    folder = source(tmp_path / "model", family, fused=fused)
    packed = family in PACKED
    formats = ["merged", "native", *(["compressed-tensors"] if packed else [])]
    run_job(folder, tmp_path / "job", formats=formats, **QUICK)
    out, before = tmp_path / "job" / "output", files(folder)
    merged = files(out / "merged")
    assert layout(merged) == layout(before)
    experts = [name for name in before if ".experts." in name and not name.endswith("bias")]
    assert not any(torch.equal(merged[name], before[name]) for name in experts)
    assert not wrongly_changed(before, merged)
    theirs = logits(AutoModelForCausalLM.from_pretrained(out / "merged"))
    assert torch.equal(logits(loader(out / "native").load(out / "native")), theirs)
    if packed:
        stored, info = AutoModelForCausalLM.from_pretrained(out / "compressed-tensors", output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(stored), theirs)


def test_packed_experts_of_a_fused_file_have_the_names_that_loaders_merge(tmp_path: Path) -> None:
    folder = source(tmp_path / "model", "qwen3_5_moe_text", fused=True)
    run_job(folder, tmp_path / "job", formats=["compressed-tensors"], **QUICK)
    out = tmp_path / "job" / "output" / "compressed-tensors"
    names = files(out)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.1.mlp.experts.11.{projection}.weight_packed" in names
    assert not [name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    for part in ("lm_head", "model.layers.1.mlp.gate", "model.layers.0.mlp.shared_expert_gate"):
        assert part in ignored


def test_experts_that_no_loader_merges_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    """gemma4's other checkpoints have no experts, so that its type alone does not say."""
    folder = source(tmp_path / "model", "gemma4_moe")
    with pytest.raises(FormatCannotHold, match="transformers merges no others") as refused:
        run_job(folder, tmp_path / "job", formats=["compressed-tensors"], **QUICK)
    assert refused.value.field == "formats.0"
    assert all(word in str(refused.value.hint) for word in ("merged", "native", "gguf"))


def test_experts_that_are_ignored_stay_beside_those_of_the_same_tensor(tmp_path: Path) -> None:
    folder = source(tmp_path / "model", "gpt_oss")
    rules = {"ignore": ["*.experts.3.*"], "overrides": {"*.experts.4.*": {"bits": 8}}}
    result = run_job(folder, tmp_path / "job", formats=["merged", "native"], modules=rules, **QUICK)
    out, name = tmp_path / "job" / "output", "model.layers.0.mlp.experts.down_proj"
    before, after = files(folder)[name], files(out / "merged")[name]
    same = [bool(torch.equal(before[expert], after[expert])) for expert in range(len(before))]
    assert same == [expert == 3 for expert in range(len(before))]
    bits = {linear.name: linear.bits for block in result.report.blocks for linear in block.linears}
    assert bits["model.layers.0.mlp.experts.4.gate_proj"] == 8
    assert bits["model.layers.0.mlp.experts.5.gate_proj"] == 4
    native = loader(out / "native").load_weights(out / "native")
    assert native.keys() == files(folder).keys()
    assert torch.equal(native[name], after)


def transposed(part: StoredPart) -> StoredPart:
    return part.model_copy(update={"transposed": not part.transposed})


def other_half(part: StoredPart) -> StoredPart:
    """Gate where up belongs, of rows that take turns."""
    start, stop, step = part.rows
    return part.model_copy(update={"rows": (1 - start, stop, step)})


@pytest.mark.parametrize("plant", [transposed, other_half])
def test_a_planted_fault_in_writing_shows(plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_oss with square matrices, where a transposed one has the same shape."""
    square = {"hidden_size": 32, "intermediate_size": 32, "dtype": torch.bfloat16, "vocab_size": 300}
    save_small_model(tmp_path / "model", "gpt_oss", **square)
    for file in tokenizer_folder().iterdir():
        shutil.copy(file, tmp_path / "model")
    jobs, put = [], checkpoint_writer.CheckpointWriter._put
    touched = "down_proj" if plant is transposed else "gate_up_proj"

    def put_wrongly(self: Any, part: StoredPart, value: Tensor) -> None:
        put(self, plant(part) if part.of.endswith(touched) else part, value)

    for name in ("right", "wrong"):
        run_job(tmp_path / "model", tmp_path / name, formats=["merged"], **QUICK)
        jobs.append(files(tmp_path / name / "output" / "merged"))
        monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_put", put_wrongly)
    name = f"model.layers.0.mlp.experts.{touched}"
    before, (right, wrong) = files(tmp_path / "model")[name].float(), (job[name].float() for job in jobs)
    assert (right - before).norm() < 0.2 * before.norm()
    assert (wrong - before).norm() > before.norm()


def test_a_router_that_is_rounded_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """phimoe's router is a linear like any other, but for its name."""
    monkeypatch.setattr("workers.engine.model.block_linears.left_alone", lambda _: False)
    folder = source(tmp_path / "model", "phimoe")
    run_job(folder, tmp_path / "job", formats=["merged"], **QUICK)
    changed = wrongly_changed(files(folder), files(tmp_path / "job" / "output" / "merged"))
    assert changed == [f"model.layers.{block}.block_sparse_moe.gate.weight" for block in (0, 1)]
