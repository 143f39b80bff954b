"""Requests that meet a busy service, a lost answer, or a refusal."""

import json
import socket
from dataclasses import replace

import httpx
import pytest

from bitwright import Client, RetryPolicy
from bitwright.errors import (
    FormatCannotHold,
    IllegalTransition,
    InvalidRequest,
    NotFound,
    RequestError,
    Unauthenticated,
    Unavailable,
)
from bitwright.job_states import JobStatus
from bitwright.retries import retry_after
from tests.bitwright.cutting_proxy import CutAnswer, CuttingProxy, Refuse
from tests.bitwright.service import QUICK, Service

BOTH_CLIENTS = True
REQUEST = {"model": "org/name", "method": "rtn", "bits": 4}


def test_a_job_goes_in_and_comes_out_with_every_default(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST | {"metadata": {"commit": "in-and-out"}})
        assert job.status is JobStatus.QUEUED
        assert job.request.quantization is not None
        assert job.request.quantization.group_size == 64
        assert job.not_checked == "hub", "nobody looks at the Hub here, which only the answer to the submission says"
        assert client.job(job.id) == job.model_copy(update={"not_checked": None})
        assert [j.id for j in client.jobs(metadata={"commit": "in-and-out"})] == [job.id]
        assert client.cancel(job.id).status is JobStatus.CANCELLED
        assert client.retry(job.id).status is JobStatus.QUEUED
        client.cancel(job.id)
        client.delete(job.id)
        with pytest.raises(NotFound):
            client.job(job.id)


def test_a_result_is_exported_by_a_job_of_its_own(service: Service) -> None:
    linear = {"form": "affine", "bits": 4, "group_size": 64, "symmetric": True, "dtype": "bfloat16"}
    native = {
        "bitwright.json": json.dumps({"format": "bitwright", "version": 2, "linears": {"a": linear}}).encode(),
        "config.json": b'{"model_type": "llama"}',
        "report.json": b"{}",
    }
    job_id = service.finished(REQUEST, {"native": native})
    with service.client() as client:
        job = client.export(job_id, ["gguf", "mlx"], metadata={"for": "phones"}, idempotency_key="once")
        assert client.export(job_id, ["gguf", "mlx"], metadata={"for": "phones"}, idempotency_key="once").id == job.id
        assert (job.request.base_job, list(job.request.formats or ())) == (job_id, ["gguf", "mlx"])
        with pytest.raises(FormatCannotHold, match=r"bitsandbytes cannot hold the affine weights"):
            client.export(job_id, ["bitsandbytes"])
        assert "q4_k" in " ".join(client.preflight_export(job_id, ["gguf"]).warnings)
        client.cancel(job.id)
    with service.resources() as bitwright:
        exported = bitwright.jobs.retrieve(job_id).export(["awq"])
        assert exported.view.request.base_job == job_id
        assert bitwright.jobs.export(job_id, ["gptq"], device="any").view.request.device == "any"


def test_lists_go_on_over_pages(service: Service) -> None:
    with service.client() as client:
        made = [client.submit(REQUEST | {"metadata": {"page": "yes"}}).id for _ in range(5)]
        listed = [job.id for job in client.jobs(limit=2, metadata={"page": "yes"})]
    assert listed == made[::-1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again(service: Service, status: int) -> None:
    with CuttingProxy(service.address, [Refuse(status), Refuse(status)]) as proxy:
        with service.client(proxy.url) as client:
            job = client.submit(REQUEST)
            assert client.job(job.id).id == job.id
        assert len(proxy.heard) == 3


def test_a_service_that_stays_busy_is_unavailable(service: Service) -> None:
    with (
        CuttingProxy(service.address, [Refuse(503)] * 10) as proxy,
        service.client(proxy.url) as client,
        pytest.raises(Unavailable),
    ):
        client.methods()
    assert len(proxy.heard) == QUICK.attempts


def test_a_submit_whose_answer_was_lost_makes_one_job(service: Service) -> None:
    label = {"metadata": {"lost": "answer"}}
    with CuttingProxy(service.address, [CutAnswer(0), CutAnswer(20)]) as proxy:
        with service.client(proxy.url) as client:
            job = client.submit(REQUEST | label)
        assert len(proxy.heard) == 3
    keys = {line for text in proxy.heard for line in text.split(b"\r\n") if line.lower().startswith(b"idempotency-key")}
    assert len(keys) == 1
    with service.client() as client:
        assert [j.id for j in client.jobs(metadata={"lost": "answer"})] == [job.id]


def test_a_request_that_may_have_had_an_effect_is_not_repeated(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST)
    with CuttingProxy(service.address, [CutAnswer(0)]) as proxy, service.client(proxy.url) as client:
        with pytest.raises(Unavailable, match="no answer from"):
            client.cancel(job.id)
        assert len(proxy.heard) == 1
        assert client.job(job.id).status is JobStatus.CANCELLED


def test_all_problems_of_a_request_arrive(service: Service) -> None:
    with service.client() as client, pytest.raises(InvalidRequest) as caught:
        client.submit({"model": "org/name", "method": "rtn", "bits": 9, "sede": 1})
    assert {problem.field for problem in caught.value.errors} == {"bits", "sede"}


def test_errors_are_the_classes_of_their_codes(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST)
        with pytest.raises(IllegalTransition):
            client.retry(job.id)
        with pytest.raises(NotFound):
            client.job("job_00000000000000000000000000")
    with replace(service, key="bw_wrong").client() as stranger, pytest.raises(Unauthenticated):
        stranger.methods()


def test_a_preflight_stores_nothing(service: Service) -> None:
    with service.client() as client:
        seen = client.preflight(REQUEST | {"metadata": {"dry": "run"}})
        assert seen.request.quantization is not None
        assert seen.request.quantization.bits == 4
        assert list(client.jobs(metadata={"dry": "run"})) == []


def test_what_the_service_offers(service: Service) -> None:
    with service.client() as client:
        assert {"rtn", "signround"} <= {method.name for method in client.methods().items}
        assert {"native", "compressed-tensors"} <= {format.name for format in client.formats()}
        assert client.workers() == []
        assert client.ready()


def test_nobody_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", retry=QUICK) as client, pytest.raises(Unavailable, match=str(port)):
        client.methods()


def test_an_answer_that_is_no_problem_document_is_an_error_by_its_status() -> None:
    front = CuttingProxy(("127.0.0.1", 1), [Refuse(404, "")])
    with front, Client(front.url, retry=QUICK) as client, pytest.raises(RequestError, match="answered 404"):
        client.methods()


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [("7", 7, 7), ("0.5", 0.5, 0.5), ("-3", 0, 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("soon", None, None)],
)
def test_retry_after(value: str, least: float | None, most: float | None) -> None:
    seconds = retry_after(httpx.Response(503, headers={"Retry-After": value}))
    assert seconds is None if least is None or most is None else least <= (seconds or 0) <= most


def test_delays_grow_and_are_bounded() -> None:
    policy = RetryPolicy(first_seconds=1, longest_seconds=8)
    delays = [[policy.delay(attempt) for _ in range(200)] for attempt in range(6)]
    for attempt, several in enumerate(delays):
        ceiling = min(8, 2**attempt)
        assert ceiling / 2 <= min(several) <= max(several) <= ceiling
        assert len(set(several)) > 1
