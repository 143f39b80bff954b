"""Jobs with llama.cpp's mixes, and with its types chosen for each matrix: files, what they say of themselves, and the
importance matrix beside them."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import ResultLine
from bitwright.report import Report
from tests.engine.conftest import TEXTS, run_job
from tests.engine.ships.llama_cpp import quantize_with
from workers.engine.text.sequences import Sequences
from workers.tiny_model import Recipe, make_tiny_model

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
SHORT: dict[str, Any] = {"calibration": TEXTS["calibration"], "evaluation": None}


@pytest.fixture(scope="session")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llama blocks of width 256, but for an MLP of 320, which no super-block divides; bf16, hardly trained."""
    recipe = Recipe(vocabulary=300, width=256, intermediate=320, blocks=2, positions=256, steps=2, batch=2, length=32)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "mixed", recipe)


@pytest.fixture(scope="session")
def mixed(mixed_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResultLine, Path]:
    """A job in the mix Q3_K_M, and its folder with the file."""
    workspace = tmp_path_factory.mktemp("mixed")
    result = run_job(
        mixed_model, workspace, formats=["gguf"], quantization={"method": "rtn", "scheme": "Q3_K_M"}, **SHORT
    )
    return result, workspace / result.checkpoints["gguf"]


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_every_matrix_has_the_type_that_llama_cpp_gives_it(mixed: tuple[ResultLine, Path]) -> None:
    """By hand from its table: q, k, gate, up Q3_K; the first two v Q5_K; o Q4_K; down Q4_K, which 320 columns make
    Q5_0; the head Q6_K, and the embeddings the base."""
    result, folder = mixed
    block = {
        **{"attn_q": "q3_k", "attn_k": "q3_k", "attn_v": "q5_k", "attn_output": "q4_k"},
        **{"ffn_gate": "q3_k", "ffn_up": "q3_k", "ffn_down": "q5_0"},
    }
    expected = {f"blk.{layer}.{name}.weight": kind for layer in range(2) for name, kind in block.items()}
    expected |= {"output.weight": "q6_k", "token_embd.weight": "q3_k"}
    found = types(folder / "model.gguf")
    assert {name: found[name] for name in expected} == expected
    assert set(found.values()) == {*expected.values(), "f32"}
    report = result.report
    assert report.embeddings is not None
    assert report.head is not None
    assert (report.embeddings.scheme, report.head.scheme) == ("q3_k", "q6_k")
    assert [linear.scheme for linear in report.blocks[0].linears] == [
        block[name] for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    fallback = [warning for warning in report.warnings if "fall back" in warning]
    assert len(fallback) == 1
    assert "of 16 linears 2 have rows" in fallback[0]
    assert "2 get q5_0 in place of q4_k" in fallback[0]


def test_the_file_says_how_it_was_made(mixed: tuple[ResultLine, Path]) -> None:
    result, folder = mixed
    found, calibration = fields(folder / "model.gguf"), result.report.calibration
    assert calibration is not None
    assert found["general.file_type"] == 12
    assert found["bitwright.method"] == "rtn"
    assert found["bitwright.scheme"] == result.report.scheme == "q3_k_m"
    assert found["bitwright.calibration.sha256"] == calibration.sha256
    assert found["bitwright.calibration.dataset"] == "builtin"
    assert "- Scheme: q3_k_m" in (folder / "README.md").read_text()


def test_the_importance_matrix_is_of_the_original_models_inputs(
    mixed: tuple[ResultLine, Path], mixed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sums by hooks on transformers' own forward pass."""
    _, folder = mixed
    ids = calibration_ids(mixed_model, tmp_path, monkeypatch)
    model, sums = AutoModelForCausalLM.from_pretrained(mixed_model), dict[str, torch.Tensor]()

    def add(name: str) -> Any:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + arguments[0].flatten(0, 1).float().square().sum(0)

        return hook

    names = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    for linear, tensor in names.items():
        model.get_submodule(f"model.layers.1.{linear}").register_forward_pre_hook(add(f"blk.1.{tensor}.weight"))
    with torch.no_grad():
        for row in ids:
            model(row[None])
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "model.imatrix").tensors}
    assert len(stored) == 28
    for name, whole in sums.items():
        assert stored[f"{name}.counts"].tolist() == [[ids.numel()]]
        assert stored[f"{name}.in_sum2"].shape == (1, len(whole))
        assert np.allclose(stored[f"{name}.in_sum2"][0], whole.numpy(), rtol=0.03)
    about = fields(folder / "model.imatrix")
    assert about["general.type"] == "imatrix"
    assert (about["imatrix.datasets"], about["imatrix.chunk_count"], about["imatrix.chunk_size"]) == (
        ["builtin"],
        8,
        32,
    )


def calibration_ids(model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The token ids that a job with the same texts calibrates on."""
    found: list[torch.Tensor] = []
    real = Sequences.report

    def watch(self: Sequences) -> Any:
        found.append(self.ids)
        return real(self)

    monkeypatch.setattr(Sequences, "report", watch)
    rtn = {"method": "rtn", "scheme": "q8_0", "modules": {"ignore": ["lm_head", "*mlp*"]}}
    run_job(model, workspace, formats=["native"], quantization=rtn, **SHORT)
    return found[0]


def reached(report: Report) -> dict[str, str | None]:
    assert report.allocation is not None
    return {linear.name: linear.scheme for linear in report.allocation.linears}


def test_a_budget_over_the_model_chooses_for_embeddings_and_head_and_is_spent_to_the_bit(
    mixed_model: Path, tmp_path: Path
) -> None:
    bits = {"average": 5.0, "over": "model", "choices": ["q2_k", "q4_k", "q8_0"]}
    result = run_job(mixed_model, tmp_path, formats=["gguf"], quantization={"method": "rtn", "bits": bits}, **SHORT)
    report, file = result.report, tmp_path / result.checkpoints["gguf"] / "model.gguf"
    chosen = reached(report)
    assert {"model.embed_tokens", "lm_head"} < chosen.keys()
    assert {chosen[f"model.layers.{n}.mlp.down_proj"] for n in range(2)} <= {"q4_0", "q5_0", "q8_0"}
    assert report.allocation is not None
    assert 4.8 < report.allocation.reached <= 5.0
    tensors = gguf.GGUFReader(file).tensors
    matrices = [tensor for tensor in tensors if tensor.tensor_type.name != "F32"]
    norms = sum(int(tensor.n_elements) for tensor in tensors) - sum(int(t.n_elements) for t in matrices)
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    # Norms are counted as the checkpoint has them, in 16 bits; the file has them in 32.
    stored = sum(int(tensor.n_bytes) for tensor in matrices) + 2 * norms
    assert 8 * stored / weights == pytest.approx(report.allocation.reached, abs=1e-9)
    assert fields(file)["bitwright.scheme"] == "chosen for each: 5 bits a weight over the model"


@pytest.mark.slow
def test_a_size_is_kept_and_filled_with_embeddings_and_head_among_what_is_chosen(
    mixed_model: Path, tmp_path: Path
) -> None:
    goal = {"bytes": "700kB", "choices": ["q2_k", "q4_k", "q8_0"]}
    body: dict[str, Any] = {
        "calibration": {"num_samples": 16, "sequence_length": 32},
        "evaluation": TEXTS["evaluation"],
    }
    result = run_job(mixed_model, tmp_path, formats=["gguf"], quantization={"method": "rtn", "at_most": goal}, **body)
    size = (tmp_path / result.checkpoints["gguf"] / "model.gguf").stat().st_size
    assert 650_000 < size <= 700_000
    assert "model.embed_tokens" in reached(result.report)
    assert result.report.goal is not None
    assert result.report.goal.met


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp")
def test_llama_cpp_quantizes_by_the_importance_matrix(mixed: tuple[ResultLine, Path], tmp_path: Path) -> None:
    """Q2_K_S asks for one: without it llama.cpp refuses, with it the file differs from one of equal weights."""
    _, folder = mixed
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "model.imatrix").tensors}
    names = [name.removesuffix(".in_sum2") for name in stored if name.endswith(".in_sum2")]
    weights = {name: (stored[f"{name}.in_sum2"] / stored[f"{name}.counts"]).ravel() for name in names}
    source, q2_k_s = folder / "model.gguf", 21
    assert quantize_with(Path(FOLDER), source, tmp_path / "none.gguf", q2_k_s, {})
    assert quantize_with(Path(FOLDER), source, tmp_path / "own.gguf", q2_k_s, weights) is None
    flat = {name: np.ones_like(each) for name, each in weights.items()}
    assert quantize_with(Path(FOLDER), source, tmp_path / "flat.gguf", q2_k_s, flat) is None
    both = [gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("own", "flat")]
    changed = [a.name for a, b in zip(*both, strict=True) if not np.array_equal(a.data, b.data)]
    assert "blk.1.attn_q.weight" in changed
    assert "token_embd.weight" not in changed
