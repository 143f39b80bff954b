"""Webhooks of a real installation: the process of the sweep calls a real receiver."""

from collections.abc import Iterator

import pytest
from cryptography.fernet import Fernet
from standardwebhooks import Webhook

from tests.e2e.installation import Installation
from tests.supervise.bench import wait_for
from tests.webhooks.receiver import Heard, running_receiver

WORKER_MODULE = "tests.supervise.scripted_worker"
DATABASE = "postgresql"
SETTINGS = {"TOKEN_KEYS": Fernet.generate_key().decode(), "WEBHOOK_ALLOWED": "127.0.0.0/8"}


@pytest.fixture
def receiver() -> Iterator[Heard]:
    with running_receiver() as heard:
        yield heard


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_sweep_tells_a_receiver_of_a_jobs_way(installed: Installation, receiver: Heard) -> None:
    webhooks = installed.client.webhooks
    made = webhooks.create(receiver.url("/ok"), events=("job.queued", "job.running", "job.succeeded"))
    job_id = installed.submit("file:a.json:{}")
    installed.wait_for_status(job_id, "succeeded")
    wait_for(lambda: len(receiver.of("/ok")) == 3, 60, what="three messages")
    told = [Webhook(made.secret).verify(body, headers) for headers, body in receiver.of("/ok")]
    assert sorted(message["type"] for message in told) == ["job.queued", "job.running", "job.succeeded"]
    assert {message["data"]["id"] for message in told} == {job_id}
    wait_for(lambda: [one.status for one in webhooks.deliveries(made.id)] == ["delivered"] * 3, 10, what="the log")
    installed["sweep"].kill()
    installed.submit("file:b.json:{}")
    installed["sweep"].start()
    wait_for(lambda: len(receiver.of("/ok")) >= 6, 60, what="what was put down while no sweep ran")
    assert made.secret not in installed.processes["sweep"].log.read_text()
    assert made.secret not in installed.processes["api"].log.read_text()
