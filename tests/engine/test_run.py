"""From an order to checkpoints: what is reported, that it is true, and that it comes out the same again."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.attempt_lines import AttemptLine, ResultLine, SpanLine
from bitwright.errors import (
    BitwrightError,
    CorruptCheckpoint,
    IndivisibleGroup,
    InvalidDataset,
    InvalidRequest,
    UnknownModule,
)
from bitwright.events import BlockEvent, MetricEvent, ProgressEvent, Stage, WarningEvent
from bitwright.report import Report
from tests.engine.conftest import Finished, finish, run_job
from workers.contracts.results import BlockResult
from workers.engine.quantize.registry import METHODS
from workers.engine.seeds import derived_seed
from workers.machine import available_threads

TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "steps": 12, "batch_size": 4, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def tuned(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tuned job that nobody disturbed."""
    return finish(small_model, tmp_path_factory.mktemp("tuned"), **TUNED)


@pytest.fixture(scope="module")
def rounded(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job that rounds to nearest."""
    return finish(small_model, tmp_path_factory.mktemp("rounded"), bits=3)


def codes(workspace: Path) -> dict[str, torch.Tensor]:
    return load_file(workspace / "output/native/weights.safetensors")


def assert_same_codes(first: Path, second: Path) -> None:
    one, other = codes(first), codes(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["rounded", "tuned"])
def test_a_job_is_reported_as_it_is(method: str, small_model: Path, request: pytest.FixtureRequest) -> None:
    finished: Finished = request.getfixturevalue(method)
    result, lines = finished.result, finished.lines
    report = result.report
    assert sum(s for stage, s in report.seconds.items() if stage != "total") == pytest.approx(report.seconds["total"])
    assert set(report.seconds) == {"load", "calibrate", "quantize", "evaluate", "export", "total"}
    assert [b.index for b in report.blocks] == [0, 1, 2]
    assert (report.blocks_computed, report.blocks_resumed) == (3, 0)
    assert report.size.quantized_weights == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)
    assert report.size.bits_per_weight == 3 + 16 / 32
    assert report.model.parameters == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(small_model).parameters()
    )
    assert report.peak_memory.host_bytes > 10_000_000
    assert report.quality is not None
    assert 0 < report.quality.kl_divergence < 2
    assert 0.3 < report.quality.top1_agreement <= 1
    assert (report.calibration is None) == (method == "rounded")
    for block in report.blocks:
        assert len(block.linears) == 7
        assert all(0 < linear.weight_error < 0.3 and linear.output_error for linear in block.linears)
        assert block.output_error is not None
        assert 0 < block.output_error < 0.3
    assert [line.index for line in lines if isinstance(line, BlockEvent)] == [0, 1, 2]
    assert {line.name for line in lines if isinstance(line, MetricEvent)} > {"perplexity", "kl_divergence"}
    stages = [line.stage for line in lines if isinstance(line, ProgressEvent)]
    assert list(dict.fromkeys(stages)) == [Stage.LOAD, Stage.QUANTIZE, Stage.EVALUATE, Stage.EXPORT]
    for folder in result.checkpoints.values():
        assert Report.model_validate_json((finished.workspace / folder / "report.json").read_text()) == report


def test_what_is_reported_is_what_the_written_checkpoint_does(small_model: Path, rounded: Finished) -> None:
    folder = rounded.workspace / rounded.result.checkpoints["compressed-tensors"]
    quality = rounded.report.quality
    assert quality is not None
    from app.domain.request.job_request import Evaluation
    from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

    part = Evaluation(num_samples=4, sequence_length=48)
    ids = evaluation_sequences(load_tokenizer(small_model), part, None, 0, None).ids
    assert quality.text.tokens == ids.numel()
    for path, perplexity in ((small_model, quality.perplexity_original), (folder, quality.perplexity)):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert perplexity == pytest.approx(math.exp(loss), rel=2e-3)


def test_the_same_request_gives_the_same_codes(
    small_model: Path, tuned: Finished, rounded: Finished, tmp_path: Path
) -> None:
    run_job(small_model, tmp_path / "again", **TUNED)
    assert_same_codes(tuned.workspace, tmp_path / "again")
    run_job(small_model, tmp_path / "other seed", seed=1, **TUNED)
    for other in (tmp_path / "other seed", rounded.workspace):
        one, two = codes(tuned.workspace), codes(other)
        blocks = {name.split(".")[2] for name in one if not torch.equal(one[name], two[name])}
        assert blocks >= {"0", "1", "2"}, f"tuning changes every block, and so does another seed: {other}"


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def interrupted(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a tuned job whose method failed when it came to the last of three blocks."""
    workspace, method = tmp_path_factory.mktemp("interrupted"), METHODS["signround"]
    original = method.quantize_block

    def quantize(task: Any, spec: Any) -> BlockResult:
        if task.index == 2:
            raise Interrupted
        return original(task, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "quantize_block", quantize)
        with pytest.raises(Interrupted):
            run_job(small_model, workspace, **TUNED)
    return workspace


@pytest.fixture
def cut(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of that workspace, to go on from."""
    return Path(shutil.copytree(interrupted, tmp_path / "cut"))


def test_a_resumed_job_has_the_codes_of_an_undisturbed_one(small_model: Path, tuned: Finished, cut: Path) -> None:
    resumed, whole = run_job(small_model, cut, **TUNED).report, tuned.report
    assert (resumed.blocks_computed, resumed.blocks_resumed) == (1, 2)
    assert_same_codes(tuned.workspace, cut)
    assert resumed.quality == whole.quality
    for one, other in zip(resumed.blocks, whole.blocks, strict=True):
        assert one.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})


def test_blocks_that_were_durable_and_untold_are_told_by_the_attempt_that_adopts_them(
    small_model: Path, tuned: Finished, cut: Path
) -> None:
    """The attempt before had finished two and died before its worker heard of the second."""
    lines: list[AttemptLine] = []
    run_job(small_model, cut, lines, {"told": 1, "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}, **TUNED)
    told = [line for line in lines if isinstance(line, BlockEvent)]
    assert [block.index for block in told] == [1, 2]
    undisturbed = [line for line in tuned.lines if isinstance(line, BlockEvent)][1:]
    assert [b.model_copy(update={"seconds": 0}) for b in told] == [
        b.model_copy(update={"seconds": 0}) for b in undisturbed
    ]
    assert told[0].seconds > 0
    spans = [line for line in lines if isinstance(line, SpanLine)]
    stages = {span.name: span for span in spans if span.parent_id == "b" * 16}
    assert list(stages)[:3] == ["load", "calibrate", "quantize"]
    (block,) = [span for span in spans if span.name == "block"]
    assert (block.attributes["bitwright.block.index"], block.parent_id) == (2, stages["quantize"].span_id), "computed"
    assert stages["quantize"].start_ns <= block.start_ns < block.end_ns <= stages["quantize"].end_ns
    assert len({span.span_id for span in spans}) == len(spans)


def test_a_finished_job_resumes_whole(small_model: Path, tuned: Finished, tmp_path: Path) -> None:
    workspace = shutil.copytree(tuned.workspace, tmp_path / "again")
    again = run_job(small_model, workspace, **TUNED)
    assert again.report.blocks_resumed == 3
    assert again.report.quality == tuned.report.quality


def other_seed(_: Path) -> dict[str, Any]:
    return {"seed": 5}


def other_bits(_: Path) -> dict[str, Any]:
    return {"bits": 4}


def other_text(_: Path) -> dict[str, Any]:
    return {"calibration": {"num_samples": 9, "sequence_length": 32}}


def nothing(_: Path) -> dict[str, Any]:
    return {}


def harmless(_: Path) -> dict[str, Any]:
    return {"metadata": {"commit": "abc"}, "priority": 3, "evaluation": None}


def damaged_first(state: Path) -> dict[str, Any]:
    data = bytearray((state / "block-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (state / "block-00000.safetensors").write_bytes(data)
    return {}


def missing_second(state: Path) -> dict[str, Any]:
    (state / "block-00001.safetensors").unlink()
    return {}


def torn_state(state: Path) -> dict[str, Any]:
    (state / "state.json").write_bytes((state / "state.json").read_bytes()[:-20])
    return {}


@pytest.mark.parametrize(
    ("change", "adopted"),
    [
        (nothing, 2),
        (harmless, 2),
        (other_seed, 0),
        (other_bits, 0),
        (other_text, 0),
        (damaged_first, 0),
        (missing_second, 1),
        (torn_state, 0),
    ],
)
def test_only_what_is_sound_and_belongs_to_the_request_is_adopted(
    change: Callable[[Path], dict[str, Any]],
    adopted: int,
    small_model: Path,
    cut: Path,
) -> None:
    report = run_job(small_model, cut, **(TUNED | change(cut / "state"))).report
    assert report.blocks_resumed == adopted
    assert report.blocks_computed == 3 - adopted


def test_smaller_micro_batches_change_the_plan_and_little_else(
    small_model: Path, tuned: Finished, tmp_path: Path
) -> None:
    whole = tuned.report
    parts = run_job(small_model, tmp_path, order={"micro_batch_divisor": 16}, **TUNED).report
    assert (whole.plan["micro_batch"], parts.plan["micro_batch"]) == (32, 2)
    assert whole.quality is not None
    assert parts.quality is not None
    assert parts.quality.kl_divergence == pytest.approx(whole.quality.kl_divergence, rel=0.3)


def test_overrides_and_ignored_linears(small_model: Path, tmp_path: Path) -> None:
    modules = {
        "ignore": ["lm_head", "model.layers.0.*"],
        "overrides": {"*.down_proj": {"bits": 8, "group_size": -1}, "model.layers.2.mlp.down_proj": {"bits": 2}},
    }
    result = run_job(small_model, tmp_path, modules=modules)
    by_name = {linear.name: linear for block in result.report.blocks for linear in block.linears}
    assert len(by_name) == 14
    assert (by_name["model.layers.1.mlp.down_proj"].bits, by_name["model.layers.1.mlp.down_proj"].group_size) == (8, -1)
    assert by_name["model.layers.2.mlp.down_proj"].bits == 2
    assert by_name["model.layers.2.mlp.up_proj"].bits == 4
    stored = load_file(tmp_path / "output/compressed-tensors/model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in stored
    assert "model.layers.1.mlp.up_proj.weight_packed" in stored


def test_an_untied_head_is_rounded_when_it_is_not_ignored(small_model: Path, tuned: Finished, tmp_path: Path) -> None:
    lines: list[AttemptLine] = []
    for _ in range(2):  # the second run resumes everything, the head too
        result = run_job(small_model, tmp_path / "head", lines, modules={"ignore": []}, formats=["native"], **TUNED)
        assert result.report.size.quantized_weights == tuned.report.size.quantized_weights + 400 * 64
    assert result.report.blocks_resumed == 3
    assert "head_rounded" in {line.code for line in lines if isinstance(line, WarningEvent)}
    assert "lm_head.codes" in codes(tmp_path / "head")


@pytest.mark.parametrize(
    ("request_part", "error", "words"),
    [
        ({"modules": {"overrides": {"model.layers.*.mlp.donw_proj": {"bits": 8}}}}, UnknownModule, "donw_proj"),
        ({"modules": {"ignore": ["lm_head", "nothing.*"]}}, UnknownModule, r"nothing\.\*"),
        ({"group_size": 48}, IndivisibleGroup, "48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj"),
        ({"group_size": 128}, IndivisibleGroup, "128 does not divide"),
        (
            {"evaluation": {"num_samples": 1, "sequence_length": 257}},
            InvalidDataset,
            "257; the model has 256 positions",
        ),
    ],
)
def test_a_request_that_does_not_fit_the_model(
    request_part: dict[str, Any], error: type[BitwrightError], words: str, small_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        run_job(small_model, tmp_path, **request_part)
    assert caught.value.field
    assert caught.value.hint


def test_the_group_sizes_that_divide_are_named(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(IndivisibleGroup) as caught:
        run_job(small_model, tmp_path, group_size=48)
    assert "8, 16, 32, 64" in str(caught.value.hint)


def test_a_tied_head_is_not_quantized(small_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied = tmp_path / "tied"
    model.save_pretrained(tied)
    for file in small_model.glob("tokenizer*"):
        (tied / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidRequest, match="lm_head shares its matrix") as caught:
        run_job(tied, tmp_path / "a", modules={"ignore": []})
    assert "modules.embeddings" in str(caught.value.hint)
    assert 'add "lm_head" to modules.ignore' in str(caught.value.hint)
    result = run_job(tied, tmp_path / "b")
    assert result.report.model.parameters == model.num_parameters()


def test_without_evaluation_there_is_no_quality(small_model: Path, tmp_path: Path) -> None:
    report = run_job(small_model, tmp_path, evaluation=None).report
    assert report.quality is None
    assert {block.output_error for block in report.blocks} == {None}
    assert run_job(small_model, tmp_path, evaluation=None, **TUNED).report.blocks[0].output_error is not None


def test_a_model_without_a_tokenizer_is_refused(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((small_model / name).read_bytes())
    with pytest.raises(CorruptCheckpoint, match="tokenizer"):
        run_job(folder, tmp_path / "workspace")


def test_code_in_the_model_folder_never_runs(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in small_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    result: ResultLine = run_job(folder, tmp_path / "workspace")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "workspace/output").rglob("evil.py"))
    assert result.report.blocks


def test_signround_is_closer_than_rounding_on_a_trained_model(tiny_model: Path, tmp_path: Path) -> None:
    size: dict[str, Any] = {
        "calibration": {"num_samples": 48, "sequence_length": 64},
        "evaluation": {"num_samples": 16, "sequence_length": 64},
    }
    reports = {}
    for method in ({"method": "rtn"}, {"method": "signround", "steps": 60}):
        name = str(method["method"])
        reports[name] = run_job(tiny_model, tmp_path / name, bits=2, group_size=64, **size, **method).report
    rounded, tuned = reports["rtn"], reports["signround"]
    assert rounded.quality is not None
    assert tuned.quality is not None
    assert tuned.quality.perplexity_original < 60, "a model that learned something"
    assert tuned.quality.kl_divergence * 1.5 < rounded.quality.kl_divergence
    for block in tuned.blocks:
        assert block.loss is not None
        assert block.loss_initial is not None
        assert block.loss < block.loss_initial


def test_seeds_of_blocks_are_stable() -> None:
    assert derived_seed(0, 0) == 6_213_027_144_842_677_344
    assert len({derived_seed(seed, index) for seed in range(4) for index in range(50)}) == 200


def test_threads_are_those_of_the_process() -> None:
    import os

    assert 1 <= available_threads() <= len(os.sched_getaffinity(0))
