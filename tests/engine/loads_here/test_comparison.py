"""The distance of two runtimes' logits, against its formula in numpy; and what counts as rounding."""

import math

import numpy as np
import pytest
import torch

from app.domain.formats import ExportFormat
from app.domain.request.job_request import JobRequest
from app.domain.runtimes import Runtime
from workers.disk.orders import AttemptOrder, RuntimePlace
from workers.engine.loads_here.checks import Check, untried
from workers.engine.loads_here.comparison import Distance, distance, read_logits

OURS = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))


def test_the_distance_is_that_of_its_formula() -> None:
    found = distance(OURS, OURS + 0.1 * NOISE)
    a, b = (each.numpy().astype(np.float64) for each in (OURS, OURS + 0.1 * NOISE))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    assert found.overall == pytest.approx(math.sqrt(((a - b) ** 2).mean() / (a**2).mean()))
    assert found.typical == pytest.approx(math.sqrt(np.median(((a - b) ** 2).mean(1)) / (a**2).mean()))


def test_log_probabilities_are_as_good_as_logits() -> None:
    assert distance(OURS, torch.log_softmax(OURS, -1)).overall < 1e-6


@pytest.mark.parametrize(
    ("typical", "overall", "is_rounding"),
    [
        (0.03, 0.03, True),
        (0.031, 0.031, False),
        (0.0, 0.15, True),  # one token went to another expert
        (0.0, 0.16, False),
        (math.nan, math.nan, False),
        (0.0, math.inf, False),
    ],
)
def test_odd_tokens_may_be_off_by_more(typical: float, overall: float, is_rounding: bool) -> None:
    assert Distance(typical, overall).is_rounding(0.03) is is_rounding


def test_one_of_many_tokens_moves_all_together_and_not_the_median() -> None:
    theirs = OURS.clone()
    theirs[3] += NOISE[3]
    found = distance(OURS, theirs)
    assert found.typical == 0
    assert 0.2 < found.overall < 0.6


def test_logits_are_as_many_as_they_are_said_to_be() -> None:
    data = OURS.numpy().tobytes()
    read = read_logits(data, 7, 50)
    assert read is not None
    assert torch.equal(read, OURS)
    assert read_logits(data, 7, 51) is None
    assert read_logits(data[:-4], 7, 50) is None
    assert read_logits(b"", 7, 0) is None


def order(**body: object) -> AttemptOrder:
    request = JobRequest.parse({"model": "org/model", "method": "rtn", **body})
    runtimes = {name: RuntimePlace(version="1") for name in ("transformers", "vllm")}
    return AttemptOrder(job_id="job_1", attempt=1, request=request, model_path="", device="cpu", runtimes=runtimes)


def test_activations_that_are_rounded_leave_more_room_where_they_cannot_be_left_out() -> None:
    def close(scheme: str, name: ExportFormat, runtime: Runtime) -> float:
        return Check.of(name, runtime, order(scheme=scheme, formats=["merged"])).close

    packed, dense = ExportFormat.COMPRESSED_TENSORS, ExportFormat.MERGED
    assert close("fp8", packed, Runtime.VLLM) == 0.3
    assert close("fp8a16", packed, Runtime.VLLM) == 0.05
    assert close("fp8", dense, Runtime.VLLM) == 0.05
    assert close("fp8", packed, Runtime.TRANSFORMERS) == 0.03


def test_a_format_that_no_runtime_of_the_worker_reads_is_named() -> None:
    (load,) = untried(order(bits=4, formats=["gguf"]))
    assert (load.format, load.runtime, load.result) == ("gguf", "llama.cpp", "not_checked")
    assert load.detail == "the worker has no llama.cpp"
    assert untried(order(bits=4)) == ()
    assert untried(order(bits=4, formats=["gguf"]).model_copy(update={"runtimes": {}})) == ()
