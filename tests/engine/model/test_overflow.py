"""A model whose own float16 pass overflows is told as such by every stage; without text no tokenizer is needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine
from bitwright.errors import CorruptCheckpoint, InvalidDataset, NumericalFailure
from bitwright.events import WarningEvent
from tests.engine.conftest import run_job
from workers.engine.text.sequences import load_tokenizer


@pytest.fixture(scope="module")
def overflowing(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in float16 with a row of huge weights: every one finite, their products not."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(small_model, folder)
    set_dtype(folder, "float16")
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, :] = 60000.0
    tensors["model.layers.0.mlp.up_proj.weight"] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(3, 400, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not AutoModelForCausalLM.from_pretrained(folder)(ids).logits.isfinite().all()
    return folder


def set_dtype(folder: Path, name: str) -> None:
    """The dtype that config.json names."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": name}))


JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq", "evaluation": None},
    "signround": {"method": "signround", "steps": 2},
    "loftq": {"method": "loftq", "formats": ["native"]},
    "a budget": {"method": "rtn", "bits": {"average": 4.6, "choices": [2, 4, 8]}},
    "Fisher information": {"method": "lq-lora", "rank": 2, "formats": ["native"], "evaluation": None},
    "generated text": {
        "method": "gptq",
        "calibration": {"dataset": "generated", "num_samples": 2, "sequence_length": 16},
    },
}


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_the_original_is_blamed_for_its_own_overflow(overflowing: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(NumericalFailure, match="original model's own outputs are not finite in float16") as caught:
        run_job(overflowing, tmp_path, **fields)
    assert caught.value.field == "model"
    assert '"bfloat16"' in str(caught.value.hint)


def test_the_way_out_is_one(overflowing: Path, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(overflowing, wider)
    set_dtype(wider, "bfloat16")
    report = run_job(wider, tmp_path / "job", method="gptq").report
    assert report.quality is not None
    assert report.model.dtype == "bfloat16"


def test_a_weight_beyond_the_model_s_dtype_is_told_from_a_damaged_one(small_model: Path, tmp_path: Path) -> None:
    told = {}
    for kind, value in (("beyond", 1e6), ("damaged", float("inf"))):
        folder = tmp_path / kind
        shutil.copytree(small_model, folder)
        set_dtype(folder, "float16")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(NumericalFailure, match=r"layers\.1\.mlp\.up_proj") as caught:
            run_job(folder, tmp_path / "job" / kind)
        told[kind] = f"{caught.value.detail} {caught.value.hint}"
    assert 'set "dtype" to "bfloat16"' in told["beyond"]
    assert "damaged" in told["damaged"]


@pytest.fixture
def without_tokenizer(small_model: Path, tmp_path: Path) -> Path:
    """The small model's folder without a tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(
        small_model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_template*")
    )
    return folder


@pytest.mark.parametrize("method", ["rtn", "nf", "loftq"])
def test_a_job_that_reads_no_text_needs_no_tokenizer(without_tokenizer: Path, tmp_path: Path, method: str) -> None:
    lines: list[AttemptLine] = []
    formats = ["merged"]
    run_job(without_tokenizer, tmp_path / "job", lines, method=method, bits=4, evaluation=None, formats=formats)
    assert "no_tokenizer" in {line.code for line in lines if isinstance(line, WarningEvent)}
    AutoModelForCausalLM.from_pretrained(tmp_path / "job" / "output" / "merged")


@pytest.mark.parametrize(
    ("fields", "reader"),
    [
        ({}, "evaluation needs one"),
        ({"method": "gptq", "evaluation": None}, "calibration needs one"),
        ({"method": "gptq"}, "calibration and evaluation needs one"),
        ({"bits": {"average": 3.5}, "evaluation": None}, "calibration needs one"),
        ({"evaluation": None, "adapter": {"kind": "lora"}, "finetune": {"dataset": "builtin"}}, "finetune needs one"),
    ],
    ids=str,
)
def test_a_job_that_reads_text_says_what_for(
    without_tokenizer: Path, tmp_path: Path, fields: dict[str, Any], reader: str
) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        run_job(without_tokenizer, tmp_path / "job", **fields)
    assert reader in caught.value.detail
    assert "sentencepiece" not in f"{caught.value.detail} {caught.value.hint}"
    assert "reads no text" in str(caught.value.hint)


def test_a_tokenizer_that_cannot_be_read_is_named_without_its_folder(small_model: Path, tmp_path: Path) -> None:
    for file in small_model.glob("*"):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


def test_a_template_s_refusal_has_a_way_out(small_model: Path, tmp_path: Path) -> None:
    shutil.copytree(small_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 4)
    order, part = {"evaluation_path": str(rows)}, {"dataset": str(rows), "num_samples": 1, "sequence_length": 32}
    with pytest.raises(InvalidDataset, match="roles must alternate") as caught:
        run_job(tmp_path / "model", tmp_path / "job", order=order, evaluation=part)
    assert "as the template wants it" in str(caught.value.hint)


def test_short_builtin_text_is_told_as_starved(small_model: Path, tmp_path: Path) -> None:
    lines: list[AttemptLine] = []
    run_job(small_model, tmp_path, lines, method="gptq")
    (told,) = [line.message for line in lines if isinstance(line, WarningEvent) and line.code == "starved_calibration"]
    assert "256 tokens" in told
