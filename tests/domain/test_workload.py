"""The cost of a job, counted by hand, and the warnings that follow from its size."""

from typing import Any

import pytest

from app.domain import workload
from app.domain.adapters import LoRASpec, QBaRASpec
from app.domain.advice import dishonoured_rank, preset_tokens, starved_calibration
from app.domain.inputs.architectures import Dimensions, read_dimensions
from app.domain.methods import LoftQSpec, RTNSpec
from app.domain.request.job_request import JobRequest

CONFIG: dict[str, object] = {
    **{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": 32},
}
BLOCKS = 2 * 3 * (8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 16 * 8)
"""Of a token: q, k, v, o, gate, up and down of three blocks, a multiplication and an addition for each weight."""
HEAD = 2 * 32 * 8
CALIBRATION, EVALUATION = {"num_samples": 8, "sequence_length": 16}, {"num_samples": 2, "sequence_length": 32}
BASE: dict[str, Any] = {"model": "a/b", "calibration": CALIBRATION, "evaluation": EVALUATION}
FINETUNE = {"dataset": "upl_0abc", "steps": 5, "batch_size": 2, "sequence_length": 16}


@pytest.fixture
def dimensions() -> Dimensions:
    return read_dimensions(CONFIG)


def parsed(**fields: Any) -> JobRequest:
    return JobRequest.parse({**BASE, **fields})


def test_the_work_of_a_job_that_tunes(dimensions: Dimensions) -> None:
    """Three passes of 128 calibration tokens, 3.5 of what is tuned, two of 64 tokens of evaluation."""
    request = parsed(method="signround", steps=5, batch_size=2)
    assert workload.flops(request, dimensions) == BLOCKS * (3 * 128 + 3.5 * 5 * 2 * 16 + 2 * 64) + HEAD * 2 * 64
    scaled = parsed(method="signround", steps=5, batch_size=2, scale_steps=3)
    more = BLOCKS * 3.5 * 3 * 4 * 16 + HEAD * 3 * 3 * 4 * 16  # four sequences a step
    assert workload.flops(scaled, dimensions) == workload.flops(request, dimensions) + more
    text = {"num_samples": 8, "sequence_length": 16}
    further = parsed(
        method="signround", steps=5, batch_size=2, scale_steps=3, calibration=text | {"further_samples": 7}
    )
    assert workload.flops(further, dimensions) == workload.flops(scaled, dimensions) + BLOCKS * 7 * 16
    unread = parsed(method="signround", steps=5, batch_size=2, calibration=text | {"further_samples": 7})
    assert workload.flops(unread, dimensions) == workload.flops(request, dimensions)
    budget = parsed(method="signround", steps=5, batch_size=2, bits={"average": 4.5})
    assert workload.flops(budget, dimensions) == workload.flops(request, dimensions) + BLOCKS * 128


def test_the_work_of_a_job_that_trains(dimensions: Dimensions) -> None:
    request = parsed(method="qlora", finetune=FINETUNE, evaluation=None)
    trained = 2 * 5 * 2 * 16
    assert workload.flops(request, dimensions) == BLOCKS * trained + HEAD * trained
    observed = parsed(method="awq", search_samples=1, finetune=FINETUNE, evaluation=None)
    searched = 3.5 * (8 + 8 * 1) * 16
    assert workload.flops(observed, dimensions) == BLOCKS * (3 * 128 + searched + trained) + HEAD * trained
    again = parsed(method="signround", finetune=FINETUNE, evaluation=None, base_job="job_1", scale_steps=9)
    assert workload.flops(again, dimensions) == BLOCKS * trained + HEAD * trained
    assert (workload.calibration_tokens(again), workload.tuned_sequences(again)) == (0, 0)


def test_the_tokens_of_a_job() -> None:
    request = parsed(method="qlora", finetune=FINETUNE)
    assert workload.calibration_tokens(parsed(method="gptq")) == 128
    assert workload.calibration_tokens(parsed(method="rtn")) == 0
    assert workload.evaluation_tokens(request) == 64
    assert workload.trained_tokens(request) == 160
    nothing = parsed(method="rtn", evaluation=None)
    assert (workload.evaluation_tokens(nothing), workload.trained_tokens(nothing)) == (0, 0)
    assert workload.readers_of(nothing) == []
    assert workload.readers_of(request) == ["finetune", "evaluation"]
    assert workload.readers_of(parsed(method="gptq", evaluation=None)) == ["calibration"]
    assert workload.readers_of(parsed(method="gptq", finetune=FINETUNE, base_job="job_1")) == ["finetune", "evaluation"]


def test_a_reference_is_measured_where_it_costs_less_than_a_tenth(dimensions: Dimensions) -> None:
    request = parsed(method="signround", steps=200, batch_size=8)
    assert workload.reference_flops(request, dimensions) == 64 * (BLOCKS + 2 * HEAD)
    assert workload.has_reference(request, dimensions)
    assert not workload.has_reference(parsed(method="signround", evaluation=None), dimensions)
    assert not workload.has_reference(parsed(method="rtn", calibration=CALIBRATION), dimensions)
    # Tuned tokens from which on the share is below a tenth, by the counts above.
    needed = (10 * 64 * (BLOCKS + 2 * HEAD) - HEAD * 128) / BLOCKS - 3 * 128 - 128
    steps = needed / (3.5 * 16)
    below = parsed(method="signround", steps=int(steps), batch_size=1)
    above = parsed(method="signround", steps=int(steps) + 1, batch_size=1)
    assert not workload.has_reference(below, dimensions)
    assert workload.has_reference(above, dimensions)


def test_round_to_nearest_that_is_trained_has_a_reference(dimensions: Dimensions) -> None:
    long = {**FINETUNE, "steps": 100_000}
    assert workload.has_reference(parsed(method="rtn", finetune=long), dimensions)


@pytest.mark.parametrize(
    ("samples", "length", "tokens", "times"),
    [
        (32, 2048, None, 4),
        (33, 2048, None, None),
        (128, 2048, 65_536, 4),
        (128, 2048, 65_537, None),
        (1, 2048, None, 128),
    ],
)
def test_a_method_is_starved_by_four_times_less_than_its_preset(
    samples: int, length: int, tokens: int | None, times: int | None
) -> None:
    request = parsed(method="signround", calibration={"num_samples": samples, "sequence_length": length})
    warning = starved_calibration(request, tokens)
    assert (warning is None) is (times is None)
    if times is not None:
        assert f"{times} times fewer than the 262,144 that signround" in str(warning)
    unread = parsed(method="rtn", calibration={"num_samples": samples, "sequence_length": length})
    assert starved_calibration(unread) is None


def test_the_tokens_that_a_method_is_set_for() -> None:
    def usual(**fields: Any) -> int:
        return preset_tokens(parsed(**fields).quantization)

    assert usual(method="omniquant", preset="light") == 128 * 512
    assert usual(method="omniquant", preset="best") == usual(method="gptq") == 128 * 2048


def test_a_rank_that_cannot_be_reached_is_told() -> None:
    linears = {"model.a": (8, 64), "lm_head": (2, 2)}
    assert dishonoured_rank(RTNSpec(), LoRASpec(rank=8), linears) is None
    assert "has at most rank 8" in str(dishonoured_rank(RTNSpec(), LoRASpec(rank=9), linears))
    factors = LoftQSpec(rank=8)
    assert dishonoured_rank(factors, None, linears) is None
    assert "at most rank 8" in str(dishonoured_rank(factors.model_copy(update={"rank": 9}), None, linears))
    assert dishonoured_rank(RTNSpec(), None, linears) is None


def test_a_kind_that_trades_shape_for_rank_is_held_to_nine_tenths_of_the_parameters() -> None:
    """Of a linear (10, 10): pools of 2 and 5 leave r' (5 + 2) numbers, of which at most 2 ranks are of use."""
    adapter = QBaRASpec(rank=1, pool_in=2, repeat_out=5)
    assert dishonoured_rank(RTNSpec(), adapter, {"a": (10, 10)}) == (
        "adapter.rank: 1 is not reached: q-bara pools inputs and repeats outputs: it has 14 trained parameters where a "
        "LoRA of that rank has 20; smaller groups or pools leave more, or another kind"
    )
    near = QBaRASpec(rank=1, pool_in=1, repeat_out=5)  # round(20 / 12) = 2 ranks of 12
    assert dishonoured_rank(RTNSpec(), near, {"a": (10, 10)}) is None
