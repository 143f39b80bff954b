"""One trace from POST /v1/jobs to the last block: a real API, a real worker and the real engine, and a collector."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.store.session import migrate
from tests.e2e.installation import Installation
from tests.e2e.real_job import submit, wait_until_quantizing
from tests.otlp import Collector, Received, collector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def received() -> Iterator[Collector]:
    with collector() as made:
        yield made


@pytest.fixture(scope="module")
def installed(
    received: Collector, short_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("traced")
    url = f"sqlite:///{folder}/data/bitwright.db"
    settings = {"OTLP_URL": received.url, "OTLP_HEADERS": '{"x-key": "of-the-collector"}'}
    with Installation(folder, short_model, url, worker_count=1, settings=settings) as made:
        migrate(url)
        yield made.start("valkey", "sweep", "api", "worker0")


def below(spans: list[Received], parent: Received) -> list[str]:
    return [span.name for span in sorted(spans, key=lambda each: each.start_ns) if span.parent_id == parent.span_id]


def test_one_trace_from_the_request_to_the_last_block(installed: Installation, received: Collector) -> None:
    job_id = submit(installed, installed.model, steps=200)
    installed.wait_for_status(job_id, "running")
    job = installed.wait_for_status(job_id, "succeeded", "failed", seconds=300)
    assert job.status.value == "succeeded", job.error
    for part in ("worker0", "api"):
        assert installed[part].stop(60) == 0, "what waits is sent"

    spans = [span for span in received.spans if span.attributes.get("bitwright.job_id") == job_id]
    assert len({span.trace_id for span in spans}) == 1
    assert len({span.span_id for span in spans}) == len(spans)
    (root,) = [span for span in spans if span.name == "POST /v1/jobs"]
    (attempt,) = [span for span in spans if span.name == "attempt"]
    assert (root.parent_id, root.service, attempt.service) == ("", "bitwright-api", "bitwright-worker")
    assert below(spans, root) == ["queue", "attempt"]
    assert below(spans, attempt) == ["load", "calibrate", "quantize", "evaluate", "export", "store"]
    (quantize,) = [span for span in spans if span.name == "quantize"]
    blocks = [span for span in spans if span.name == "block"]
    assert [block.attributes["bitwright.block.index"] for block in blocks] == [0, 1]
    assert {block.parent_id for block in blocks} == {quantize.span_id}
    for block in blocks:
        assert quantize.start_ns <= block.start_ns < block.end_ns <= quantize.end_ns
    for inner, outer in ((quantize, attempt), (attempt, attempt)):
        assert outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns
    assert {span.attributes["bitwright.method"] for span in spans if span is not root} == {"signround"}
    assert attempt.attributes["bitwright.outcome"] == "succeeded"
    assert not any(span.failed for span in spans)

    assert {headers["x-key"] for headers in received.headers} == {"of-the-collector"}
    sent = b"".join(received.bodies)
    for secret in ("bw_", "of-the-collector", str(installed.model), str(installed.folder)):
        assert secret.encode() not in sent, "no key, no path, no text"


def test_an_attempt_that_is_killed_is_told_as_failed_and_the_next_one_is_of_the_same_trace(
    installed: Installation, received: Collector
) -> None:
    installed.ensure("api", "worker0")
    job_id = submit(installed, installed.model, steps=1800)
    wait_until_quantizing(installed, job_id, 1, blocks_done=1)
    os.kill(installed.attempt_pids(job_id)[0], signal.SIGKILL)
    installed.wait_for_status(job_id, "succeeded", seconds=300)
    assert installed["worker0"].stop(60) == 0
    assert installed["api"].stop(60) == 0
    spans = [span for span in received.spans if span.attributes.get("bitwright.job_id") == job_id]
    (root,) = [span for span in spans if span.name == "POST /v1/jobs"]
    assert {span.trace_id for span in spans} == {root.trace_id}
    assert below(spans, root) == ["queue", "attempt", "queue", "attempt"]
    attempts = sorted((span for span in spans if span.name == "attempt"), key=lambda span: span.start_ns)
    assert [span.failed for span in attempts] == [True, False]
    assert [span.attributes["bitwright.outcome"] for span in attempts] == ["attempt_killed", "succeeded"]
    blocks = [span for span in spans if span.name == "block"]
    assert sorted(block.attributes["bitwright.block.index"] for block in blocks) == [0, 1], "each once"
    assert [block.attributes["bitwright.attempt"] for block in blocks] == [1, 2]
