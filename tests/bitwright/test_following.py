"""A job's events to the end, over connections that break."""

import threading

import pytest

from bitwright.errors import NotFound, Unavailable
from bitwright.events import BlockEvent, ProgressEvent, Stage, StatusEvent
from bitwright.job_states import JobStatus
from bitwright.views import EventView
from tests.bitwright.cutting_proxy import CutAnswer, CuttingProxy, Fate, Pass
from tests.bitwright.service import Service

BOTH_CLIENTS = True
REQUEST = {"model": "org/name", "method": "rtn", "bits": 4}
BLOCKS = 12


def play(service: Service, pause: threading.Event) -> None:
    """A worker's whole attempt: a block every 20 ms."""
    claimed = service.claim()
    for index in range(BLOCKS):
        progress = ProgressEvent(stage=Stage.QUANTIZE, done=index, total=BLOCKS, unit="blocks")
        block = BlockEvent(index=index, total=BLOCKS, name=f"layers.{index}", loss=0.5, seconds=0.1)
        service.tell(claimed, [progress, block])
        pause.wait(0.02)
    service.succeed(claimed)


def follow(service: Service, url: str) -> tuple[JobStatus, list[EventView]]:
    with service.client(url) as client:
        job = client.submit(REQUEST)
        worker = threading.Thread(target=play, args=(service, threading.Event()))
        worker.start()
        seen: list[EventView] = []
        final = client.wait(job.id, on_event=seen.append)
        worker.join()
    return final.status, seen


def test_every_event_arrives_once_and_in_order(service: Service) -> None:
    with CuttingProxy(service.address) as proxy:
        status, seen = follow(service, proxy.url)
    assert status is JobStatus.SUCCEEDED
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert [e.event.index for e in seen if isinstance(e.event, BlockEvent)] == list(range(BLOCKS))
    statuses = [e.event.status for e in seen if isinstance(e.event, StatusEvent)]
    assert statuses == [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED]


def test_a_cut_stream_goes_on_after_the_last_event(service: Service) -> None:
    # The first connection carries the submission; the cuts come in the middle of events.
    plan: list[Fate] = [CutAnswer(2500), CutAnswer(700), CutAnswer(900), CutAnswer(0), Pass()]
    with CuttingProxy(service.address, plan) as proxy:
        status, seen = follow(service, proxy.url)
    assert status is JobStatus.SUCCEEDED
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert [e.event.index for e in seen if isinstance(e.event, BlockEvent)] == list(range(BLOCKS))
    assert len(proxy.heard) >= 4


def test_a_retried_job_is_followed_past_its_earlier_end(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST)
        client.cancel(job.id)
        client.retry(job.id)
        worker = threading.Thread(target=play, args=(service, threading.Event()))
        worker.start()
        statuses = [e.event.status for e in client.events(job.id) if isinstance(e.event, StatusEvent)]
        worker.join()
    assert statuses[1] is JobStatus.CANCELLED
    assert statuses[-1] is JobStatus.SUCCEEDED


def test_the_events_of_a_finished_job_are_replayed_and_end(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST)
        client.cancel(job.id)
        seen = list(client.events(job.id))
        assert [e.sequence for e in seen] == [1, 2]
        assert list(client.events(job.id, after=2)) == []
        assert [e.sequence for e in client.events_page(job.id).items] == [1, 2]


def test_an_unknown_job_is_not_waited_for(service: Service) -> None:
    with service.client() as client, pytest.raises(NotFound):
        client.wait("job_00000000000000000000000000")


def test_a_service_that_is_gone_ends_the_wait(service: Service) -> None:
    with service.client() as client:
        job = client.submit(REQUEST)
    gone = CuttingProxy(service.address, [CutAnswer(0)] * 99)
    with gone, service.client(gone.url) as client, pytest.raises(Unavailable):
        client.wait(job.id)
    with service.client() as client:
        client.cancel(job.id)
