"""Parts that a GGUF file does not hold, or holds unquantized: told in warnings and in the card."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.architectures.configurations import SIZES, random_model
from tests.engine.conftest import run_job
from tests.engine.ships.gguf_models import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def job(folder: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """The GGUF folder of a job on a random model, and the job's result."""
    monkeypatch.setitem(SIZES, "vocab_size", 400)
    random_model(model_type).save_pretrained(folder / "source")
    save_tokenizer(folder / "source")
    result = run_job(folder / "source", folder / "job", formats=["gguf", "merged"], evaluation=None)
    return folder / "job" / result.checkpoints["gguf"], result


def test_a_vision_tower_is_left_to_llama_cpps_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = job(tmp_path, "qwen2_vl", monkeypatch)
    card = (folder / "README.md").read_text()
    assert "convert_hf_to_gguf.py --mmproj" in card
    assert "not known to make the same model" in card
    (told,) = [warning for warning in result.report.warnings if "left out" in warning]
    assert "visual" in told
    names = {tensor.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert not [name for name in names if not name.startswith(("blk.", "token_embd", "output"))]


def test_a_matrix_that_is_transposed_has_its_quantized_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's latent keys: llama.cpp multiplies by the transposed, of which blocks of the tuned one are no part."""
    folder, result = job(tmp_path, "deepseek_v2", monkeypatch)
    (told,) = [warning for warning in result.report.warnings if "in their own dtype" in warning]
    assert told.startswith("gguf stores 4 quantized linears")
    merged = load_file(tmp_path / "job" / result.checkpoints["merged"] / "model.safetensors")
    whole = merged["model.layers.1.self_attn.kv_b_proj.weight"].view(4, 32, 32)
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert torch.equal(stored["blk.1.attn_k_b.weight"], whole[:, :16].transpose(1, 2))
    assert torch.equal(stored["blk.1.attn_v_b.weight"], whole[:, 16:])
