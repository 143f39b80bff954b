"""Goals that sizes alone put out of reach, told from a checkpoint's headers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.domain.estimates import estimate
from app.domain.fit import misfits, refusal
from app.domain.inputs.inspection import FolderFiles, Inspection, inspect_checkpoint
from app.domain.request.job_request import JobRequest
from bitwright.errors import GoalOutOfReach, InvalidRequest

CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    **{"num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": True, "dtype": "bfloat16"},
}
LINEARS = {
    **{"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)},
    **{"self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)},
}
OF_LINEARS = 2 * 2 * sum(out * width for out, width in LINEARS.values())
KEPT = 2 * (512 * 64 + 64)
"""Bytes of embeddings and a norm; before it, of the linears of both blocks."""


@pytest.fixture
def inspection(tmp_path: Path) -> Inspection:
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in LINEARS.items()
    }
    shapes |= {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return inspect_checkpoint(FolderFiles(tmp_path))


def problems(inspection: Inspection, **fields: Any) -> dict[str, tuple[str, str]]:
    request = JobRequest.parse({"model": "org/name", "method": "rtn", "formats": ["native"], **fields})
    return {problem.field: (problem.code, problem.detail) for problem in misfits(request, inspection)}


def test_a_size_below_what_stays_is_refused_with_that_number(inspection: Inspection) -> None:
    found = problems(inspection, at_most={"bytes": KEPT - 100})
    assert found.keys() == {"quantization.at_most"}
    code, detail = found["quantization.at_most"]
    assert code == "goal_out_of_reach"
    assert "embeddings" in detail
    request = JobRequest.parse({"model": "org/name", "method": "rtn", "at_most": {"bytes": 1}})
    assert isinstance(refusal(misfits(request, inspection)), GoalOutOfReach)


def test_a_size_below_the_smallest_choices_is_refused_too(inspection: Inspection) -> None:
    codes = OF_LINEARS // 8
    scales = OF_LINEARS // 64
    least = KEPT + codes + scales
    assert "quantization.at_most" in problems(inspection, at_most={"bytes": least - 1})
    headers = 20_000
    assert problems(inspection, at_most={"bytes": least + headers}) == {}
    assert problems(inspection, at_most={"kl": 1e-9}) == {}


def test_memory_that_the_cache_alone_fills_is_refused(inspection: Inspection) -> None:
    a_token = 2 * 2 * 2 * 16 * 2
    found = problems(inspection, fits={"memory": 1000 * a_token, "context": 1000})
    assert found["quantization.fits"][0] == "invalid_request"
    assert "KV cache" in found["quantization.fits"][1]
    found = problems(inspection, fits={"memory": int(1.1 * (1000 * a_token + KEPT // 2)), "context": 1000})
    assert found["quantization.fits"][0] == "goal_out_of_reach"
    assert problems(inspection, fits={"memory": "1GB", "context": 1000}) == {}


def test_an_fp8_cache_takes_one_byte_a_value(inspection: Inspection) -> None:
    a_token = 2 * 2 * 2 * 16
    goal = {"memory": int(1.1 * (1000 * a_token + KEPT + OF_LINEARS)), "context": 1000}
    assert "quantization.fits" in problems(inspection, fits=goal)
    assert problems(inspection, fits=goal, kv_cache="fp8") == {}


@pytest.mark.parametrize(("formats", "times"), [(["native"], 1), (["mlx"], 1), (["compressed-tensors"], 2)])
def test_quantized_embeddings_count_as_they_are_stored(inspection: Inspection, formats: list[str], times: int) -> None:
    def is_refused(limit: int, **modules: Any) -> bool:
        goal = {"method": "rtn", "at_most": {"bytes": limit, "choices": [4]}, "modules": modules}
        request = JobRequest.parse({"model": "org/name", "formats": formats, "quantization": goal})
        return "goal_out_of_reach" in {problem.code for problem in misfits(request, inspection)}

    four, linears, headers = {"bits": 4, "group_size": 64}, OF_LINEARS // 4 + OF_LINEARS // 64, 20_000
    least = 2 * 64 + times * 512 * (64 // 2 + 2) + linears
    assert is_refused(least - 1, embeddings=four)
    assert not is_refused(least + headers, embeddings=four)
    if formats == ["native"]:
        alone = KEPT + 512 * (64 // 2 + 2) + linears
        assert is_refused(alone - 1, head=four)
        assert not is_refused(alone + headers, head=four)


def test_an_average_over_the_model_counts_what_stays(inspection: Inspection) -> None:
    weights = OF_LINEARS // 2 + KEPT // 2
    least = (8 * KEPT + 2.25 * OF_LINEARS / 2) / weights
    budget = {"over": "model", "choices": [2, 4]}
    found = problems(inspection, bits=budget | {"average": least - 0.1})
    assert "of the whole model" in found["quantization.bits.average"][1]
    assert problems(inspection, bits=budget | {"average": least + 4}) == {}


def test_an_estimate_is_of_the_size_that_is_asked_for(inspection: Inspection) -> None:
    def size(**fields: Any) -> int:
        request = JobRequest.parse({"model": "org/name", "method": "rtn", "formats": ["native"], **fields})
        return int(estimate(request, inspection)["bytes_checkpoint"])

    widest = size(at_most={"kl": 0.1})
    assert size(at_most={"bytes": widest - 1000}) == widest - 1000
    assert size(at_most={"bytes": "1GB"}) == widest
    assert size(bits={"average": 12, "over": "model"}) == 12 * (OF_LINEARS + KEPT) // 16


def test_a_cache_that_is_not_known_is_refused_when_the_job_is_posted(inspection: Inspection) -> None:
    strange = Inspection(**{**vars(inspection), "config": CONFIG | {"mamba_d_state": 16}})
    request = JobRequest.parse({"model": "org/name", "method": "rtn", "fits": {"memory": "1GB", "context": 64}})
    with pytest.raises(InvalidRequest, match="mamba_d_state"):
        raise refusal(misfits(request, strange))
