"""GGUF files beside llama.cpp's: the original as a file, the imatrix, the plan's rows and the tables' arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from app.domain.request.job_request import JobRequest
from benchmarks.gguf import rows
from benchmarks.gguf.originals import write_importance, write_original
from benchmarks.gguf.rows import IMATRIX, OURS, Ours, Peer
from benchmarks.gguf.table import change_of, over_seeds, row_of, tables
from benchmarks.gguf.trained import write_trained
from tests.tiny_model import tiny_model_folder

FOLDER = os.environ.get("BITWRIGHT_TEST_LLAMA_CPP", "")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("original") / "original.gguf"
    write_original(tiny_model_folder(), file)
    return file


def test_the_original_is_the_model_in_fp32(original: Path) -> None:
    whole = GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(
        original.parent, gguf_file=original.name, quantization_config=whole, dtype=torch.float32
    ).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_folder(), dtype=torch.float32).state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(original).tensors} == {"F32"}


def test_importance_is_the_mean_square_of_each_linear_s_inputs(original: Path, tmp_path: Path) -> None:
    ids = torch.randint(4, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    write_importance(tiny_model_folder(), ids, "cpu", tmp_path / "importance.npz")
    found = dict(np.load(tmp_path / "importance.npz"))
    linears = {tensor.name for tensor in gguf.GGUFReader(original).tensors if tensor.name.startswith("blk.")}
    assert found.keys() == {name for name in linears if "norm" not in name}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(), dtype=torch.bfloat16)
    with torch.no_grad():
        layer = model.model.layers[0]
        inputs = layer.input_layernorm(model.model.embed_tokens(ids)).float()
    expected = inputs.square().mean((0, 1)).numpy()
    assert found["blk.0.attn_q.weight"] == pytest.approx(expected, rel=1e-3)
    assert found["blk.0.attn_v.weight"] == pytest.approx(expected, rel=1e-3)


def planned() -> list[rows.Row]:
    kinds, arms = list(rows.TYPES), list(OURS)
    names = list(rows.MIXES)
    return [*rows.ffn_down(kinds, arms), *rows.one_type(kinds, arms), *rows.mixes(names, arms, arms)]


def test_every_row_of_ours_is_a_request_and_stands_beside_one_of_llama_cpp() -> None:
    plan = planned()
    baselines = {(row.table, row.subject) for row in plan if row.baseline}
    assert all((row.table, row.subject) in baselines for row in plan)
    assert all(isinstance(row.make, Peer) == row.name.startswith("llama.cpp") for row in plan)
    for row in plan:
        if isinstance(row.make, Ours):
            size = {"at_most": {"bytes": 1 << 30}} if row.make.at_most else {}
            JobRequest.parse({"model": "/m", "quantization": {**row.make.quantization, **size}, "formats": ["gguf"]})


def test_a_change_and_its_error_are_those_of_resampling() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.gamma(4.0, size=200)
    ours = theirs * 0.7 + generator.normal(0, 0.3, size=200)
    change, error = change_of(ours.tolist(), theirs.tolist())
    assert change == ours.sum() / theirs.sum() - 1
    draws = generator.integers(0, 200, (4000, 200))
    assert error == pytest.approx((ours[draws].sum(1) / theirs[draws].sum(1)).std(), rel=0.1)


def told(name: str, seed: int, kl: list[float]) -> dict[str, Any]:
    place = {"model": "m", "table": "t", "subject": "q2_k", "name": name, "seed": seed, "place": 0}
    return {**place, "kl": kl, "nll": [20.0, 20.0], "same": [6.0, 9.0], "tokens": 20, "bytes": 1_500_000}


def test_tables_compare_with_the_baseline_of_the_same_seed() -> None:
    given = [told(IMATRIX, seed, [1.0 + seed, 3.0]) for seed in (0, 1)]
    given += [told("ours", 0, [0.5, 1.5]), told("ours", 1, [1.0, 1.0])]
    assert row_of(given[2], given[0]) == "| q2_k | ours | 1.50 | 0.1000 | -50.0% ± 0.0% | 7.389 | 75.0% |  |"
    assert "| q2_k | ours | 1.50 | 0.1000 | -60.0%" in tables(given)
    assert "| ours | 2 | 0.1000 ± 0.0000 | -55.0% ± 7.1% |" in over_seeds(given)
    assert not over_seeds(given[:1])


@pytest.mark.slow
def test_a_trained_model_learns_and_has_rows_of_whole_super_blocks(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    loss = write_trained(tmp_path / "m", text, device="cpu", seed=0, steps=60, blocks=1, batch=4, vocabulary=512)
    assert loss < 0.8 * np.log(512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype is torch.bfloat16
    linears = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    assert all(linear.in_features % 256 == 0 for linear in linears)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="make test-llama-cpp installs llama.cpp")
def test_rows_of_both_sides_are_printed(tmp_path: Path) -> None:
    """On a model of rows that no super-block divides, so that both fall back to Q4_0, of which files are as large."""
    text = tmp_path / "text.jsonl"
    command = [sys.executable, "-m", "benchmarks.gguf", str(tiny_model_folder()), "--llama-cpp", FOLDER]
    lines = [json.dumps({"text": f"Row {i} of a text, with its {i * 7} words. " * 9}) for i in range(60)]
    text.write_text("\n".join(lines))
    sizes = ["--samples", "2", "--length", "32", "--sequences", "2", "--judged-length", "32", "--workers", "1"]
    chosen = ["--tables", "types", "--types", "q2_k", "--arms", "rtn, searched", "--device", "cpu", "--judges", "1"]
    texts = ["--calibration", str(text), "--valid", str(text)]
    done = subprocess.run([*command, *sizes, *chosen, *texts], cwd=ROOT, capture_output=True, check=True, text=True)
    cells = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| q2_k")]
    found = {line[1]: float(line[3]) for line in cells}
    assert found.keys() == {"llama.cpp", IMATRIX, "rtn, searched"}
    assert all(0 < divergence < 5 for divergence in found.values())
    assert len({line[2] for line in cells}) == 1
