"""Every method of the registry on two real processes: both make the same, and what one process makes.

Each process sees half of the samples. What a method observes are sums over both, and a step's minibatch is divided; a
method that looks at weights and statistics alone runs the same on each. The spec's `shared_batch` says whether the plan
gives a job of the method several processes. A new method is tested by its line in the registry.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from app.domain.methods import METHODS as NAMED
from app.domain.methods import WeightSpec
from app.domain.request.job_request import JobRequest
from tests.conformance.test_methods import assert_same, every_method, quantized, quick, task_for
from tests.engine.conftest import TEXTS, run_job, small_model  # noqa: F401 - a fixture
from tests.engine.device.rank_pair import SIZE, RankPair, RankRun, run_job_on_ranks
from tests.engine.device.steps_of_ranks import steps_of_ranks
from workers.contracts.blocks import BlockTask
from workers.contracts.results import BlockResult
from workers.engine.device.process_group import ProcessGroup, checksum, joined
from workers.engine.quantize.registry import METHODS
from workers.engine.tune.tuner import Tuner
from workers.supervise.attempt.world_size import world_size

LONGER = {"steps": 30, "epochs": 6, "batch_size": 8}
"""Enough steps for codes to move."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without steps": {"steps": 0, "epochs": 0},
    "asymmetric": {"symmetric": False, "bits": 3},
    "both streams": {"aug_loss": True},
    "by layer": {"granularity": "layer"},
}
"""Fields of specs; a method that has none of a variant's fields, or refuses their values, is not run in it."""
Results = dict[tuple[str, str], BlockResult]


def spec_of(name: str, variant: str) -> WeightSpec | None:
    changed = VARIANTS[variant]
    if changed and not changed.keys() & NAMED[name].spec.model_fields.keys():
        return None
    try:
        return quick(name, **(LONGER | changed))
    except ValidationError:
        return None


CASES = {(name, variant): spec for name in METHODS for variant in VARIANTS if (spec := spec_of(name, variant))}
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


def exact_task(spec: WeightSpec) -> BlockTask:
    """In fp64, where the order in which samples are summed decides no code."""
    task = task_for(spec)
    streams: dict[str, Any] = {field: getattr(task, field).double() for field in ("inputs", "inputs_fp", "targets")}
    return replace(task, block=task.block.double(), **streams)


def quantized_on_ranks(rank: int, rendezvous: str) -> Results:
    """Every case, as one of the processes."""
    results: Results = {}
    with joined(ProcessGroup(rank, SIZE), rendezvous, torch.device("cpu")) as processes:
        for case, spec in CASES.items():
            task = exact_task(spec)
            shares: dict[str, Any] = {
                field: processes.share(getattr(task, field)) for field in ("inputs", "inputs_fp", "targets")
            }
            shared = replace(task, **shares, tune=Tuner(processes=processes).tune, sum_=processes.sum_)
            results[case] = quantized(case[0], shared, spec)
    return results


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPair]:
    with RankPair() as processes:
        yield processes


@pytest.fixture(scope="module")
def on_ranks(pair: RankPair, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process makes of every case."""
    answers = pair.run(quantized_on_ranks, str(tmp_path_factory.mktemp("ranks") / "rendezvous"))
    if errors := [answer for answer in answers if isinstance(answer, Exception)]:
        raise ExceptionGroup("quantized_on_ranks", errors)
    return answers


def losses(result: BlockResult) -> list[float]:
    """Before and after; none of a method that has none."""
    return [float(loss) for loss in (result.loss_initial, result.loss) if loss is not None]


@every_case
def test_both_processes_make_the_same_bits(case: tuple[str, str], on_ranks: list[Results]) -> None:
    first, second = (results[case] for results in on_ranks)
    assert_same(first, second)
    assert checksum(first.linears.values()) == checksum(second.linears.values())
    assert first.parameters.keys() == second.parameters.keys()
    assert all(torch.equal(value, second.parameters[name]) for name, value in first.parameters.items())
    assert losses(first) == losses(second)


@every_case
def test_two_processes_make_what_one_makes(case: tuple[str, str], on_ranks: list[Results]) -> None:
    """Of the same steps: their minibatches follow from how the samples are divided."""
    two, spec = on_ranks[0][case], CASES[case]
    task = exact_task(spec)
    with steps_of_ranks(len(task.inputs)):
        one = quantized(case[0], task, spec)
    assert two.linears.keys() == one.linears.keys()
    for name, linear in one.linears.items():
        assert torch.equal(two.linears[name].weight.codes, linear.weight.codes)
        # Scales and factors are rounded to fp32 or less: a sum in another order may round the other way.
        torch.testing.assert_close(two.linears[name].dequantize(), linear.dequantize(), rtol=1e-5, atol=1e-6)
    for name, value in one.parameters.items():
        torch.testing.assert_close(two.parameters[name], value, rtol=1e-5, atol=1e-6)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)


@every_case
def test_the_plan_gives_processes_to_methods_that_share_their_samples_alone(case: tuple[str, str]) -> None:
    spec = CASES[case]
    body = {"model": "org/name", "quantization": spec.model_dump(mode="json", exclude_unset=True) | {"method": case[0]}}
    assert world_size(JobRequest.parse(body), SIZE) == (SIZE if spec.shared_batch() else 1)
    assert bool(spec.shared_batch()) <= spec.observes_inputs(), "there are no samples to share"


def job_on_ranks(pair: RankPair, model: Path, folder: Path, body: dict[str, Any], attempt: int) -> list[RankRun]:
    folder.mkdir(exist_ok=True)
    runs = pair.run(run_job_on_ranks, model, folder, body, attempt, seconds=600)
    if errors := [run for run in runs if isinstance(run, Exception)]:
        raise ExceptionGroup("run_job_on_ranks", errors)
    return runs


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_method
def test_a_job_of_two_processes_is_reported_as_one_and_goes_on_from_its_blocks(
    name: str,
    pair: RankPair,
    small_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    fields = quick(name, group_size=32, batch_size=4).model_dump(mode="json", exclude_unset=True)
    request: dict[str, Any] = {"quantization": fields | {"method": name}, "formats": ["native"]}
    runs = job_on_ranks(pair, small_model, tmp_path / "two", TEXTS | request, 1)
    one = run_job(small_model, tmp_path / "one", **request["quantization"], formats=["native"]).report
    assert runs[0].result is not None
    two = runs[0].result.report
    assert runs[0].made.keys() == runs[1].made.keys()
    for index, made in runs[0].made.items():
        assert all(torch.equal(tensor, runs[1].made[index][key]) for key, tensor in made.items())
    errors = [fmean(block.output_error or 0.0 for block in report.blocks) for report in (two, one)]
    # bf16 blocks, and other minibatches: the model is as good, its codes are others.
    assert errors[0] == pytest.approx(errors[1], rel=0.15)
    assert [block.counters.keys() for block in two.blocks] == [block.counters.keys() for block in one.blocks]
    weights = [(tmp_path / folder / "output/native/weights.safetensors").read_bytes() for folder in ("one", "two")]
    if not quick(name).reads_text():
        assert weights[0] == weights[1]
    (tmp_path / "two/state/block-00002.safetensors").unlink()
    again = job_on_ranks(pair, small_model, tmp_path / "two", TEXTS | request, 2)
    assert again[0].result is not None
    report = again[0].result.report
    assert (report.blocks_computed, report.blocks_resumed) == (1, 2)
    assert (tmp_path / "two/output/native/weights.safetensors").read_bytes() == weights[1]
