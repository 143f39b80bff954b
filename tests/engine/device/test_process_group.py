"""Two ranks, which are real processes, compute what one does: the same gradient, the same steps, the same codes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.domain.methods import Scheme, SignRoundSpec
from app.domain.request.job_request import JobRequest
from bitwright.errors import InternalError
from bitwright.events import BlockEvent, LogEvent
from bitwright.report import Report
from tests.engine.conftest import TEXTS, run_job
from tests.engine.device.rank_pair import SIZE, RankPair, RankRun, run_job_on_ranks
from tests.engine.device.steps_of_ranks import batches_of, splits_of, steps_of_ranks, union
from tests.engine.model.random_models import save_random_model
from tests.engine.scales.test_float_grids import float_task
from tests.engine.tune.test_tuner import RecordedWeights, weights_of
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TuningOutcome, TuningSettings
from workers.engine.device.process_group import ProcessGroup, checksum, joined
from workers.engine.scales.tuning import ScaleOutcome, tune_scales
from workers.engine.tune.tuner import Tuner
from workers.methods.sign_round import SignRound
from workers.numerics.quantized import AffineWeight, LinearResult
from workers.supervise.attempt.world_size import world_size

SCHEME = Scheme(bits=3, group_size=16, symmetric=True)
SETTINGS = TuningSettings(6, 8, 0.1)
TUNED: dict[str, Any] = {"method": "signround", "bits": 3, "group_size": 32, "steps": 12, "batch_size": 4}
SCALED: dict[str, Any] = TUNED | {"bits": 2, "symmetric": False, "scale_steps": 16}


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPair]:
    with RankPair() as found:
        yield found


def run_on_both(pair: RankPair, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Values that both ranks return; what they raise is raised."""
    found = pair.run(function, *arguments)
    if errors := [answer for answer in found if isinstance(answer, Exception)]:
        raise ExceptionGroup(function.__name__, errors)
    return found


# ---- What is exchanged -------------------------------------------------------------------------------------------


def connected(rank: int, store: Path, compute: Callable[[ProcessGroup], Any]) -> Any:
    """The value that `compute` returns while the ranks can reach each other."""
    with joined(ProcessGroup(rank, SIZE), str(store), torch.device("cpu")) as processes:
        return compute(processes)


def exchange(processes: ProcessGroup) -> dict[str, Any]:
    sums = torch.arange(3.0, dtype=torch.bfloat16) + processes.rank
    processes.sum_(sums)
    return {
        "sum": sums.tolist(),
        "total": processes.total(5 + processes.rank),
        "least": processes.least(7 - processes.rank),
        "agree": (processes.agree(4), processes.agree(processes.rank)),
        "share": processes.share(torch.arange(5)).tolist(),
        "share_size": (processes.share_size(8), processes.share_size(1)),
        "leads": processes.leads,
    }


def test_ranks_exchange_sums_and_share_all_rows(pair: RankPair, tmp_path: Path) -> None:
    first, second = run_on_both(pair, connected, tmp_path / "store", exchange)
    assert first["share"] + second["share"] == [0, 2, 4, 1, 3]
    assert (first["leads"], second["leads"]) == (True, False)
    for found in (first, second):
        assert found["sum"] == [1, 3, 5]
        assert (found["total"], found["least"], found["share_size"]) == (11, 6, (4, 1))
        assert found["agree"] == (True, False)


def test_a_world_of_one_exchanges_nothing(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an exchange")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    assert run_job(small_model, tmp_path, **SCALED).report.plan["world_size"] == 1
    rows = torch.arange(4)
    assert ProcessGroup().share(rows).data_ptr() == rows.data_ptr()


# ---- The tuner -----------------------------------------------------------------------------------------------------


def double_task() -> BlockTask:
    task = toy_task({"up": SCHEME, "down": SCHEME})
    inputs, targets = task.inputs.double(), task.targets.double()
    return replace(task, block=task.block.double(), inputs=inputs, inputs_fp=inputs, targets=targets)


def shared_task(processes: ProcessGroup) -> BlockTask:
    task = double_task()
    inputs, targets = processes.share(task.inputs), processes.share(task.targets)
    return replace(task, inputs=inputs, inputs_fp=inputs, targets=targets, tune=Tuner(processes=processes).tune)


def tune_recorded(processes: ProcessGroup, moves: float) -> tuple[TuningOutcome, RecordedWeights]:
    task = shared_task(processes)
    weights = weights_of(task, moves=moves)
    return task.tune(task, [weights], SETTINGS), weights


def recorded_still(processes: ProcessGroup) -> tuple[TuningOutcome, RecordedWeights]:
    return tune_recorded(processes, 0.0)


def test_the_summed_gradient_is_that_of_one_process_over_the_whole_batch(pair: RankPair, tmp_path: Path) -> None:
    """The oracle is autograd in fp64, without the tuner."""
    found = run_on_both(pair, connected, tmp_path / "store", recorded_still)
    task = double_task()
    parameter = (task.linear("up").weight.detach() * 0.9).requires_grad_()
    batches = batches_of(len(task.inputs), SETTINGS, task.seed)
    assert batches.shape == (6, 8)
    for step, batch in enumerate(batches):
        assert len(set(batch.tolist())) == 8
        output = torch.func.functional_call(task.block, {"up.weight": parameter}, task.inputs[batch])
        (expected,) = torch.autograd.grad((output - task.targets[batch]).square().mean(), parameter)
        for _, weights in found:
            gradient = weights.gradients[step].view_as(expected)
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    held_out = union(lambda rank: splits_of(len(task.inputs), task.seed)[rank][1])
    assert not set(held_out.tolist()) & set(batches.flatten().tolist())
    with torch.no_grad():
        output = torch.func.functional_call(task.block, {"up.weight": parameter}, task.inputs[held_out])
        error = float((output - task.targets[held_out]).square().mean())
    assert [outcome.loss_initial for outcome, _ in found] == pytest.approx([error, error], rel=1e-10)


def tuned(processes: ProcessGroup) -> BlockResult:
    task = shared_task(processes)
    return SignRound().quantize_block(task, SignRoundSpec(steps=40, batch_size=8, scale_search=False))


def test_two_ranks_tune_as_one_process_does_with_their_batches(pair: RankPair, tmp_path: Path) -> None:
    first, second = run_on_both(pair, connected, tmp_path / "store", tuned)

    with steps_of_ranks(32):
        one = SignRound().quantize_block(double_task(), SignRoundSpec(steps=40, batch_size=8, scale_search=False))
    assert one.loss is not None
    assert one.loss_initial is not None
    assert one.loss < 0.9 * one.loss_initial
    assert (first.loss, first.loss_initial) == (second.loss, second.loss_initial)
    assert first.loss == pytest.approx(one.loss, rel=1e-3)
    for name in one.linears:
        mine, other, alone = (result.linears[name].affine for result in (first, second, one))
        assert torch.equal(mine.codes, other.codes)
        assert torch.equal(mine.scale, other.scale)
        assert (mine.codes != alone.codes).float().mean() < 1e-3


def moved_codes(folder: Path, processes: ProcessGroup) -> ScaleOutcome:
    """FP4 and others of a saved model tuned end to end, each rank on its share of six sequences."""
    saved = "tests.engine.scales.test_tuning.save_random_model"
    with patch(saved, lambda folder, *_, **__: AutoModelForCausalLM.from_pretrained(folder)):
        task = float_task(folder, "llama", steps=60, codes=True)
    inputs, targets = (processes.share(states) for states in (task.inputs, task.targets))
    outcome = tune_scales(replace(task, inputs=inputs, targets=targets, processes=processes))
    assert isinstance(outcome, ScaleOutcome)
    return outcome


def test_two_ranks_move_the_same_codes(pair: RankPair, tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", "llama")
    first, second = run_on_both(pair, connected, tmp_path / "store", partial(moved_codes, tmp_path / "model"))
    assert first.is_better
    assert first.divergence == second.divergence
    assert first.changed == second.changed > 0
    assert first.codes.keys() == second.codes.keys()
    assert all(torch.equal(first.codes[name], second.codes[name]) for name in first.codes)


# ---- Whole jobs ----------------------------------------------------------------------------------------------------


def job_on_ranks(pair: RankPair, model: Path, workspace: Path, attempt: int = 1, **request: Any) -> list[RankRun]:
    """The rank's runs; `request` as in `run_job`."""
    quantization = {"method": "rtn", "group_size": 32} | ({} if "at_most" in request else {"bits": 4})
    quantization |= {name: request.pop(name) for name in list(request) if name not in JobRequest.model_fields}
    workspace.mkdir(exist_ok=True)
    body = {"quantization": quantization, **TEXTS, **request}
    return run_on_both(pair, run_job_on_ranks, model, workspace, body, attempt)


def report_of(runs: list[RankRun]) -> Report:
    assert runs[0].result is not None
    assert runs[1].result is None
    assert runs[1].lines == []
    return runs[0].result.report


def assert_same_made(runs: list[RankRun]) -> None:
    first, second = (run.made for run in runs)
    assert first.keys() == second.keys()
    for index, made in first.items():
        assert made.keys() == second[index].keys()
        assert all(torch.equal(made[name], second[index][name]) for name in made)


def test_rounding_on_two_ranks_is_rounding_on_one(pair: RankPair, small_model: Path, tmp_path: Path) -> None:
    """One sequence of evaluation: the second rank has nothing to look at."""
    text: dict[str, Any] = {"evaluation": {"num_samples": 1, "sequence_length": 48}}
    runs = job_on_ranks(pair, small_model, tmp_path / "two", **text)
    two, one = report_of(runs), run_job(small_model, tmp_path / "one", **text).report
    assert two.plan["world_size"] == 2
    assert_same_made(runs)
    weights = [(tmp_path / name / "output/native/weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert two.quality == one.quality
    for found, expected in zip(two.blocks, one.blocks, strict=True):
        assert found.model_copy(update={"seconds": 0}) == expected.model_copy(update={"seconds": 0})


def test_two_ranks_make_the_same_weights_and_close_ones_to_one_ranks(
    pair: RankPair, small_model: Path, tmp_path: Path
) -> None:
    """Nine sequences, which two do not divide; the head and all scales are tuned or rounded, too."""
    sizes = {"calibration": {"num_samples": 9, "sequence_length": 32}}
    request = SCALED | sizes | {"modules": {"ignore": []}, "formats": ["native"]}
    runs = job_on_ranks(pair, small_model, tmp_path / "two", **request)
    two, one = report_of(runs), run_job(small_model, tmp_path / "one", **request).report
    assert_same_made(runs)
    assert sorted(runs[0].made) == [0, 1, 2, 3]
    assert [line.index for line in runs[0].lines if isinstance(line, BlockEvent)] == [0, 1, 2]
    assert two.calibration == one.calibration
    assert two.quality is not None
    assert one.quality is not None
    assert two.quality.perplexity_original == pytest.approx(one.quality.perplexity_original, rel=1e-6)
    assert two.quality.kl_divergence == pytest.approx(one.quality.kl_divergence, rel=0.3)
    assert two.scales is not None
    assert two.scales.held_out == 2
    for found, expected in zip(two.blocks, one.blocks, strict=True):
        assert found.loss is not None
        assert found.loss_initial is not None
        assert found.loss < found.loss_initial
        assert found.output_error == pytest.approx(expected.output_error, rel=0.3)


OBSERVING: list[Any] = [
    {"method": "gptq"},
    {"method": "awq", "search_samples": 16},
    {"method": "omniquant", "epochs": 2, "batch_size": 2, "aug_loss": True},
    {"method": "apiq", "steps": 12, "batch_size": 2, "rank": 4},
    pytest.param(
        {"method": "apiq", "steps": 12, "batch_size": 4, "rank": 4, "granularity": "layer"}, marks=pytest.mark.slow
    ),
    pytest.param(
        {"method": "apiq", "steps": 12, "batch_size": 6, "rank": 4, "base": "signround", "aug_loss": True},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("method", OBSERVING, ids=str)
def test_what_two_ranks_observe_is_what_one_observes(
    method: dict[str, Any], pair: RankPair, small_model: Path, tmp_path: Path
) -> None:
    """Nine sequences, of which each rank sees a share; without steps, the first block has all but the same codes."""
    request = {"bits": 3, "group_size": 32, "calibration": {"num_samples": 9, "sequence_length": 32}, **method}
    assert world_size(JobRequest.parse({"model": "org/name", **request}), SIZE) == SIZE
    runs = job_on_ranks(pair, small_model, tmp_path / "two", **request)
    two, one = report_of(runs), run_job(small_model, tmp_path / "one", **request).report
    assert_same_made(runs)
    errors = [fmean(block.output_error or 0.0 for block in report.blocks) for report in (two, one)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    # SignRound's steps go by signs: where one is near to call, sums in another order take two blocks apart.
    near = 0.25 if method.get("base") == "signround" else 0.1
    for found, expected in zip(two.blocks, one.blocks, strict=True):
        assert found.output_error == pytest.approx(expected.output_error, rel=near)
        assert found.counters.keys() == expected.counters.keys()
    if method["method"] in ("gptq", "awq"):
        codes = [load_file(tmp_path / name / "output/native/weights.safetensors") for name in ("one", "two")]
        names = [name for name in codes[0] if name.startswith("model.layers.0.") and name.endswith(".codes")]
        same = torch.cat([(codes[0][name] == codes[1][name]).flatten() for name in names])
        assert same.float().mean() > 0.97


EACH_FOR_ITSELF: list[Any] = [
    pytest.param({"method": "nf", "bits": 4, "group_size": 32}, marks=pytest.mark.slow),
    {"method": "loftq", "bits": 3, "group_size": 32, "rank": 4},
]


@pytest.mark.parametrize("method", EACH_FOR_ITSELF, ids=str)
def test_two_ranks_finetune_a_base_that_each_makes_for_itself(
    method: dict[str, Any], pair: RankPair, small_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"grid and scale {n} of a block"}) + "\n" for n in range(60)))
    part = {
        "dataset": {"source": "local", "path": str(rows)},
        **{"steps": 6, "batch_size": 3, "sequence_length": 32, "learning_rate": 0.01, "validation_share": 0.2},
    }
    request = {**method, "formats": ["native"], "finetune": part}
    assert world_size(JobRequest.parse({"model": "org/name", **request}), SIZE) == SIZE
    runs, order = job_on_ranks(pair, small_model, tmp_path / "two", **request), {"finetuning_path": str(rows)}
    two, one = (
        report_of(runs).finetuning,
        run_job(small_model, tmp_path / "one", order=order, **request).report.finetuning,
    )
    assert_same_made(runs)
    made = [load_file(tmp_path / name / "output/native/weights.safetensors") for name in ("one", "two")]
    codes = [name for name in made[0] if name.endswith(".codes")]
    assert codes
    assert all(torch.equal(made[0][name], made[1][name]) for name in codes)
    assert two is not None
    assert one is not None
    assert one.loss_after is not None
    assert one.loss_before is not None
    assert one.loss_after < 0.95 * one.loss_before
    # The same numbers until a gradient is summed in another order; from then on a high rate drives bf16 apart.
    assert two.loss_before == pytest.approx(one.loss_before, rel=1e-6)
    assert two.losses[0].loss == pytest.approx(one.losses[0].loss, rel=1e-6)
    assert two.loss_after == pytest.approx(one.loss_after, rel=1e-2)
    for mine, other in zip(two.losses, one.losses, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-2)


BUDGETS: list[dict[str, Any]] = [
    {"method": "gptq", "bits": {"average": 3.5, "choices": [2, 3, 4]}},
    {"method": "lq-lora", "bits": {"average": 3.2, "choices": [2, 3, 4]}, "rank": 4, "iterations": 2},
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_two_ranks_spend_a_budget_as_one_does_and_adopt_how_it_was_spent(
    budget: dict[str, Any], pair: RankPair, small_model: Path, tmp_path: Path
) -> None:
    """Nine sequences, of which each rank sees a share; second moments and Fisher information are sums over all."""
    sizes = {"calibration": {"num_samples": 9, "sequence_length": 32}}
    grid = {"group_sizes": [32], "absmax_bits": [3, 8], "superblocks": [16]} if budget["method"] == "lq-lora" else {}
    request = budget | grid | sizes | {"formats": ["native"], "evaluation": None}
    runs = job_on_ranks(pair, small_model, tmp_path / "two", **request)
    two, one = report_of(runs), run_job(small_model, tmp_path / "one", **request).report
    assert_same_made(runs)
    assert two.allocation is not None
    assert one.allocation is not None
    assert two.allocation.linears == one.allocation.linears
    assert two.allocation.error == pytest.approx(one.allocation.error, rel=1e-2)
    assert two.allocation.average is not None
    assert two.allocation.reached <= two.allocation.average
    prepared = (tmp_path / "two/state/prepared.json").read_bytes()
    (tmp_path / "two/state/state.json").unlink()
    again = report_of(job_on_ranks(pair, small_model, tmp_path / "two", 2, **request))
    assert (tmp_path / "two/state/prepared.json").read_bytes() == prepared
    assert again.allocation == two.allocation, "the seconds too: nothing was measured again"


@pytest.mark.slow
def test_two_ranks_reach_a_goal_as_one_does_and_measure_nothing_twice(
    pair: RankPair, small_model: Path, tmp_path: Path
) -> None:
    sizes = {"calibration": {"num_samples": 13, "sequence_length": 32}}
    request: dict[str, Any] = {"method": "gptq", "at_most": {"kl": 0.015}, "formats": ["native"], "evaluation": None}
    request |= sizes
    runs = job_on_ranks(pair, small_model, tmp_path / "two", **request)
    two, one = report_of(runs).goal, run_job(small_model, tmp_path / "one", **request).report.goal
    assert_same_made(runs)
    assert two is not None
    assert one is not None
    assert (two.chosen, two.met, two.rounds) == (one.chosen, one.met, one.rounds)
    for mine, other in zip(two.frontier, one.frontier, strict=True):
        assert mine.bytes == other.bytes
        assert mine.kl_predicted == pytest.approx(other.kl_predicted, rel=0.02)
    again = report_of(job_on_ranks(pair, small_model, tmp_path / "two", 2, **request))
    assert again.goal == two, "the seconds too"
    assert again.blocks_resumed == len(again.blocks)


def test_a_job_on_two_ranks_goes_on_from_its_blocks(pair: RankPair, small_model: Path, tmp_path: Path) -> None:
    whole = report_of(job_on_ranks(pair, small_model, tmp_path / "a", **SCALED))
    files = {file.name: file.read_bytes() for file in (tmp_path / "a/state").iterdir()}
    damaged = bytearray(files["block-00002.safetensors"])
    damaged[-1] ^= 1
    (tmp_path / "a/state/block-00002.safetensors").write_bytes(damaged)
    runs = job_on_ranks(pair, small_model, tmp_path / "a", 2, **SCALED)
    again = report_of(runs)
    assert (again.blocks_computed, again.blocks_resumed) == (1, 2)
    assert [sorted(run.made) for run in runs] == [[2], [2]]
    assert again.quality == whole.quality
    assert {f.name for f in (tmp_path / "a/state").iterdir()} == set(files)
    for name in ("block-00002.safetensors", "scales.safetensors"):
        assert (tmp_path / "a/state" / name).read_bytes() == files[name]


def differing_job(rank: int, model: Path, workspace: Path, body: dict[str, Any]) -> RankRun:
    """As `run_job_on_ranks`, but the second rank has other codes in one place of its second block."""
    quantize = SignRound.quantize_block

    def differ(self: SignRound, task: BlockTask, spec: SignRoundSpec) -> BlockResult:
        result = quantize(self, task, spec)
        if rank == 1 and task.index == 1:
            next(iter(result.linears.values())).weight.codes[0, 0] ^= 1
        return result

    with patch.object(SignRound, "quantize_block", differ):
        return run_job_on_ranks(rank, model, workspace, body)


def test_a_checksum_looks_into_every_tensor() -> None:
    weight = AffineWeight(
        codes=torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16),
        zero_point=torch.tensor([[1, 2]], dtype=torch.uint8),
        scheme=Scheme(bits=2, group_size=2, symmetric=False),
        dtype=torch.bfloat16,
    )
    whole = checksum([LinearResult(weight)])
    assert whole == checksum([LinearResult(weight.to("cpu"))])
    for name in ("codes", "scale", "zero_point"):
        other = getattr(weight, name).clone()
        other[0, 0] += 1
        assert checksum([LinearResult(replace(weight, **{name: other}))]) != whole


def test_ranks_that_disagree_fail_before_anything_is_kept(pair: RankPair, small_model: Path, tmp_path: Path) -> None:
    found = pair.run(differing_job, small_model, tmp_path, {"quantization": TUNED, **TEXTS})
    for error in found:
        assert isinstance(error, InternalError)
        assert "block 1" in str(error)
    assert not (tmp_path / "state/block-00001.safetensors").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_on_gpus_replay_graphs_around_their_exchange(pair: RankPair, small_model: Path, tmp_path: Path) -> None:
    """Also where the two share one GPU, and gloo carries what NCCL would."""
    workspace = tmp_path / "two"
    workspace.mkdir()
    body = {"quantization": SCALED, **TEXTS}
    runs = run_on_both(pair, run_job_on_ranks, small_model, workspace, body, 1, "cuda")
    report = report_of(runs)
    assert_same_made(runs)
    assert not [line for line in runs[0].lines if isinstance(line, LogEvent) and line.event == "capture_failed"]
    assert report.scales is not None
    assert report.scales.captured
    one = run_job(small_model, tmp_path / "one", **SCALED, order={"device": "cuda"}).report
    for found, expected in zip(report.blocks, one.blocks, strict=True):
        assert found.loss is not None
        assert found.loss_initial is not None
        assert found.loss < found.loss_initial
        assert found.output_error == pytest.approx(expected.output_error, rel=0.3)


# ---- What is taken over --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_take_over_the_same_blocks(pair: RankPair, small_model: Path, tmp_path: Path) -> None:
    """Each reads the base job itself; the one that writes stores what both have."""
    run_job(small_model, tmp_path / "earlier", method="rtn")
    base = tmp_path / "earlier/output"
    part = {"dataset": "builtin", "steps": 2, "batch_size": 4, "sequence_length": 32, "validation_sequences": 4}
    body = {"base_job": "job_1", "method": "rtn", "group_size": 32, **TEXTS, "formats": ["native"], "finetune": part}
    (tmp_path / "job").mkdir()
    first, second = run_on_both(pair, run_job_on_ranks, small_model, tmp_path / "job", body, 1, "cpu", base)
    assert first.made.keys() == {0, 1, 2}
    for index, made in first.made.items():
        assert made.keys() == second.made[index].keys()
        assert all(torch.equal(tensor, second.made[index][name]) for name, tensor in made.items())
    before = load_file(base / "native/weights.safetensors")
    after = load_file(tmp_path / "job/output/native/weights.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert first.result.report.base_job.blocks_adopted == 3
