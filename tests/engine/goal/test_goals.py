"""Jobs with a goal through the engine: what is made keeps it, on text and in files that the search never saw."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app.domain.attempt_lines import AttemptLine
from app.domain.formats import ExportFormat
from app.domain.methods import Form
from app.domain.request.goal_problems import sized_formats
from bitwright.errors import GoalOutOfReach
from bitwright.events import BlockEvent, ErrorData
from bitwright.report import GoalReport, Report
from tests.engine.conftest import run_job
from tests.tiny_model import tiny_model_folder
from workers.engine.goal import held_out, stage
from workers.methods.gptq import GPTQ
from workers.supervise.attempt.requirements import missed_requirement

ENOUGH: dict[str, Any] = {
    "calibration": {"num_samples": 16, "sequence_length": 32},
    "evaluation": {"num_samples": 8, "sequence_length": 32},
}
MORE: dict[str, Any] = {
    "calibration": {"num_samples": 64, "sequence_length": 64},
    "evaluation": {"num_samples": 48, "sequence_length": 64},
}
KL: dict[str, Any] = {"at_most": {"kl": 0.02}, **MORE}


@pytest.fixture(scope="session")
def trained() -> Path:
    """Two Llama blocks of width 128, trained until their rounding matters."""
    return tiny_model_folder()


def goal_of(report: Report) -> GoalReport:
    assert report.goal is not None
    return report.goal


def distance(report: Report) -> float:
    assert report.quality is not None
    return report.quality.kl_divergence


def weights(workspace: Path) -> dict[str, bytes]:
    files = sorted((workspace / "output" / "native").glob("*.safetensors"))
    return {name: tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
            if name.endswith("codes")}  # fmt: skip


def milestones(lines: list[AttemptLine]) -> list[int | None]:
    return [line.milestone for line in lines if isinstance(line, BlockEvent)]


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_distance_is_kept_on_held_out_text_and_the_next_smaller_size_misses_it(
    trained: Path, tmp_path: Path, method: str
) -> None:
    report = run_job(trained, tmp_path / "made", method=method, **KL).report
    found = goal_of(report)
    assert found.met
    assert found.next_smaller_misses
    assert distance(report) <= 0.02
    assert 0 < found.chosen < len(found.frontier) - 1
    smaller = {"at_most": {"bytes": found.frontier[found.chosen - 1].bytes}}
    other = run_job(trained, tmp_path / "smaller", method=method, **(KL | smaller)).report
    assert other.size.bits_per_weight < report.size.bits_per_weight
    assert distance(other) > 0.02
    assert missed_requirement(None, report) is None
    assert (found.rounds > 1) == (method == "gptq")
    assert report.blocks_computed == len(report.blocks), "rounds before the last are no earlier attempts"


def test_the_frontier_is_monotone_and_its_measurements_are_what_was_made(trained: Path, tmp_path: Path) -> None:
    found = goal_of(run_job(trained, tmp_path, at_most={"kl": 0.02}, **ENOUGH).report)
    for smaller, larger in zip(found.frontier, found.frontier[1:], strict=False):
        assert smaller.bytes < larger.bytes
        assert smaller.bits_per_weight < larger.bits_per_weight
        assert (smaller.error or 0) > (larger.error or 0)
        assert (smaller.kl_predicted or 0) >= (larger.kl_predicted or 0)
    measured = [point for point in found.frontier if point.kl_rounded is not None]
    assert 2 <= len(measured) <= 8
    assert all(point.kl_predicted == point.kl_rounded for point in measured)
    assert found.text is not None
    assert found.text.num_samples == 4, "a quarter of the calibration text"


PACKED = [name.value for name in sized_formats(ExportFormat) if Form.AFFINE in name.info.kinds]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_a_size_is_kept_by_the_files(trained: Path, tmp_path: Path, name: str, symmetric: bool) -> None:
    request = {"formats": [name], "symmetric": symmetric, "evaluation": None, "calibration": ENOUGH["calibration"]}
    if symmetric not in ExportFormat(name).info.symmetries:
        pytest.skip("the format has no such weights")
    with pytest.raises(GoalOutOfReach) as refused:
        run_job(trained, tmp_path / "least", at_most={"bytes": 1000}, **request)
    least = refused.value.frontier[0].bytes
    limit = least + 60_000
    report = run_job(trained, tmp_path / "made", at_most={"bytes": limit}, **request).report
    found = goal_of(report)
    files = [
        p for pattern in ExportFormat(name).info.weight_files for p in (tmp_path / "made/output" / name).glob(pattern)
    ]
    size = sum(file.stat().st_size for file in files)
    assert found.bytes == {name: size}
    assert size <= limit
    assert found.met
    assert size > found.frontier[found.chosen].bytes - 25_000, "what is estimated is close to what is written"


def test_several_formats_keep_a_size_each(trained: Path, tmp_path: Path) -> None:
    limit = 480_000
    report = run_job(
        trained, tmp_path, at_most={"bytes": limit}, formats=["native", "compressed-tensors"], **ENOUGH
    ).report
    assert goal_of(report).bytes.keys() == {"native", "compressed-tensors"}
    assert all(size <= limit for size in goal_of(report).bytes.values())


def test_memory_is_shared_with_a_cache(trained: Path, tmp_path: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["hidden_size"] * 2
    cache = 100 * a_token // config["num_attention_heads"]
    memory = int((480_000 + cache) * 1.1) + 1
    report = run_job(trained, tmp_path, fits={"memory": memory, "context": 50, "sequences": 2}, **ENOUGH).report
    found = goal_of(report)
    assert found.goal == "memory"
    assert found.cache_bytes == cache
    assert found.weight_limit == pytest.approx(480_000, abs=2)
    assert (max(found.bytes.values()) + cache) * 1.1 <= memory
    with pytest.raises(GoalOutOfReach):
        run_job(trained, tmp_path / "more", fits={"memory": memory, "context": 500, "sequences": 2}, **ENOUGH)


def test_a_budget_over_the_model_counts_what_stays_as_it_is(trained: Path, tmp_path: Path) -> None:
    whole = {"average": 8.0, "over": "model", "choices": [2, 3, 4, 8]}
    report = run_job(trained, tmp_path, bits=whole, formats=["native"], **ENOUGH).report
    assert report.allocation is not None
    assert 7.8 < report.size.bits_per_weight_model <= 8.0
    assert report.allocation.reached == pytest.approx(report.size.bits_per_weight_model, rel=1e-3)
    assert report.allocation.over == "model"


def test_a_goal_chooses_among_schemes_too(trained: Path, tmp_path: Path) -> None:
    choices = [2, "nvfp4a16", "mxfp4a16", "fp8a16"]
    goal = {"kl": 0.02, "choices": choices}
    report = run_job(trained, tmp_path, at_most=goal, formats=["native"], **ENOUGH).report
    assert goal_of(report).met
    linears = {linear.name: linear for block in report.blocks for linear in block.linears}
    assert {linear.scheme or linear.bits for linear in linears.values()} <= {2, "nvfp4a16", "mxfp4a16", "fp8a16"}
    assert len({linear.scheme for linear in linears.values()}) > 1
    for block in range(2):
        start = f"model.layers.{block}."
        assert len({linears[f"{start}self_attn.{x}_proj"].scheme for x in "qkv"}) == 1
        assert len({linears[f"{start}mlp.{x}_proj"].scheme for x in ("gate", "up")}) == 1


@pytest.mark.parametrize("choices", [[2, "nvfp4a16", "fp8a16"], ["nvfp4a16", "fp8", "int8"]])
def test_rounding_is_measured_as_it_is_made(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: list[Any]
) -> None:
    """With linears that a runtime joins, scales as the request searches them, rounded inputs, embeddings and head."""
    made, judged = list[float](), stage._Aim.judged

    def measured(self: Any, index: int, job: Any, quantized: Any) -> int:
        made.append(self.held_out.made(job, quantized.head))
        return judged(self, index, job, quantized)

    monkeypatch.setattr(stage._Aim, "judged", measured)
    outer = {"embeddings": {"bits": 8, "group_size": 32}, "head": {"bits": 6, "group_size": 32}}
    request: dict[str, Any] = {"scale_search": False, "formats": ["native"], "modules": outer}
    found = goal_of(run_job(trained, tmp_path, at_most={"kl": 0.02, "choices": choices}, **request, **ENOUGH).report)
    point = found.frontier[found.chosen]
    assert made == [pytest.approx(point.kl_rounded, rel=1e-4)]


def test_inputs_by_calibrated_numbers_and_a_cache_are_rounded_as_well(trained: Path, tmp_path: Path) -> None:
    goal = {"kl": 0.5, "choices": ["nvfp4", "fp8-tensor"]}
    for method in ("rtn", "gptq"):
        found = goal_of(
            run_job(trained, tmp_path / method, method=method, at_most=goal, kv_cache="fp8", formats=["native"],
                    **ENOUGH).report
        )  # fmt: skip
        assert found.met


@pytest.mark.parametrize("name", ["native", "compressed-tensors", "gguf", "mlx"])
def test_a_size_is_kept_with_quantized_embeddings(trained: Path, tmp_path: Path, name: str) -> None:
    """The first with a head in 16 bits, the second with all of one scheme, the others with a head of its own width."""
    four = {"bits": 4, "group_size": 32}
    heads: dict[str, Any] = {"native": {}, "compressed-tensors": {"head": four}}
    outer = {"embeddings": four, **heads.get(name, {"head": four | {"bits": 8}})}
    choices = [4] if name == "compressed-tensors" else [4, 8]
    request: dict[str, Any] = {"formats": [name], "evaluation": None, "calibration": ENOUGH["calibration"]}
    with pytest.raises(GoalOutOfReach) as refused:
        run_job(trained, tmp_path / "least", at_most={"bytes": 1000, "choices": choices}, modules=outer, **request)
    limit = refused.value.frontier[0].bytes + 30_000
    at_most = {"bytes": limit, "choices": choices}
    report = run_job(trained, tmp_path / "made", at_most=at_most, modules=outer, **request).report
    assert report.embeddings is not None
    assert report.embeddings.bits == 4
    found = goal_of(report)
    assert found.met
    assert found.bytes[name] <= limit
    assert found.bytes[name] > found.frontier[found.chosen].bytes - 25_000, (
        "what is estimated is close to what is written"
    )


def test_a_distance_out_of_reach_ends_before_tuning_with_the_frontier(trained: Path, tmp_path: Path) -> None:
    goal = {"kl": 1e-4, "choices": [2, 3]}
    lines: list[Any] = []
    with pytest.raises(GoalOutOfReach) as refused:
        run_job(trained, tmp_path, lines, method="gptq", at_most=goal, **ENOUGH)
    assert not any(line.type == "block" for line in lines)
    error = ErrorData.model_validate_json(ErrorData.of(refused.value).model_dump_json()).exception()
    assert isinstance(error, GoalOutOfReach)
    assert error.frontier == refused.value.frontier
    assert 2 <= len(error.frontier) <= 30
    assert all(point.kl_predicted is not None for point in error.frontier)
    assert error.frontier[-1].kl_rounded is not None
    assert error.frontier[-1].kl_rounded > 1e-4
    assert error.field == "quantization.at_most"


def test_a_loose_goal_makes_the_smallest(trained: Path, tmp_path: Path) -> None:
    found = goal_of(run_job(trained, tmp_path, at_most={"kl": 50.0}, **ENOUGH).report)
    assert (found.chosen, found.met, found.next_smaller_misses) == (0, True, None)


def test_too_few_rounds_miss_the_goal_and_say_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out.HeldOut, "made", lambda *_: 0.5)
    goal = {"kl": 0.02, "rounds": 1}
    report = run_job(trained, tmp_path, method="gptq", at_most=goal, **ENOUGH).report
    assert not goal_of(report).met
    missed = missed_requirement(None, report)
    assert missed is not None
    assert missed.field == "quantization.at_most.kl"
    assert "0.5" in missed.detail


@pytest.mark.slow
def test_an_interrupted_job_goes_on_in_the_round_in_hand(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"at_most": {"kl": 0.05}, "method": "gptq", **ENOUGH}
    whole = run_job(trained, tmp_path / "whole", **request).report
    quantize, seen = GPTQ.quantize_block, list[int]()

    def until_the_second_block_of_the_second_round(self: GPTQ, task: Any, spec: Any) -> Any:
        seen.append(task.index)
        if seen == [0, 1, 0, 1]:
            raise KeyboardInterrupt
        return quantize(self, task, spec)

    told: list[AttemptLine] = []
    with monkeypatch.context() as patched:
        patched.setattr(GPTQ, "quantize_block", until_the_second_block_of_the_second_round)
        with pytest.raises(KeyboardInterrupt):
            run_job(trained, tmp_path / "killed", told, **request)
    assert milestones(told) == [0, 1, 2]
    more: list[AttemptLine] = []
    with monkeypatch.context() as patched:
        patched.setattr(stage, "predicted_errors", None)  # not scored again
        patched.setattr(held_out.HeldOut, "rounded", None)  # nor measured
        # The last event was lost with its attempt, and is told now.
        again = run_job(trained, tmp_path / "killed", more, order={"told": 2}, **request).report
    rounds = goal_of(again).rounds
    assert rounds > 1
    assert milestones(more) == list(range(2, 2 * rounds)), "each block of each round once"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert goal_of(again).model_dump(exclude={"seconds"}) == goal_of(whole).model_dump(exclude={"seconds"})
    assert again.quality == whole.quality
    assert len(list((tmp_path / "killed" / "state").glob("point-*"))) == 1, "only the result's blocks are kept"
