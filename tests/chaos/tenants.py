"""The tenants of a run of chaos: they submit what the plan says, and ask again for what was cancelled or given up."""

import threading
import time

from app.domain.job_states import MAX_RETRIES_WITHOUT_PROGRESS
from bitwright.errors import BitwrightError
from bitwright.job_states import FINAL_STATUSES, JobStatus
from tests.chaos.faults import recipe_body
from tests.chaos.plan import Plan
from tests.chaos.service import Service

GIVEN_UP = frozenset({"attempt_killed", "worker_lost"})
"""Codes with which a job may fail here: its attempts were struck again and again, before any progress."""


class Tenants:
    """All tenants, in one thread that submits and one that looks after the jobs."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self._service = service
        self._plan = plan
        self._done = threading.Event()
        self._submitted = threading.Event()
        self._threads = [threading.Thread(target=run, name=run.__name__) for run in (self._submit, self._look_after)]
        self.asked_again: list[str] = []

    def __enter__(self) -> "Tenants":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(200)

    @property
    def content(self) -> bool:
        """True if everything was submitted, and all of it has succeeded."""
        service = self._service
        return self._submitted.is_set() and all(service.status(job) is JobStatus.SUCCEEDED for job in service.jobs)

    def _submit(self) -> None:
        story = self._service.story
        began = story.seconds
        for job in self._plan.submissions:
            if self._done.wait(max(0.0, began + job.at - story.seconds)):
                return
            try:
                self._service.submit(job.tenant, job.recipe, recipe_body(job.recipe))
            except BitwrightError as error:
                self._service.complain(f"{job.tenant} could not submit: {error.code}: {error.detail}")
        self._submitted.set()

    def _look_after(self) -> None:
        while not self._done.wait(1.0):
            for job_id in tuple(self._service.jobs):
                try:
                    self._look_at(job_id)
                except BitwrightError as error:
                    self._service.complain(f"{job_id} could not be retried: {error.code}: {error.detail}")

    def _look_at(self, job_id: str) -> None:
        service = self._service
        was_cancelled = job_id in service.cancelled
        job = service.job(job_id)
        if job.status not in FINAL_STATUSES or job.status is JobStatus.SUCCEEDED:
            if was_cancelled and job.status is JobStatus.SUCCEEDED:
                service.cancelled.discard(job_id)
                service.complain(f"{job_id} was cancelled while no worker lived, and succeeded")
            return
        if job.status is JobStatus.CANCELLED:
            if not was_cancelled:
                service.complain(f"{job_id} is cancelled, and nobody asked for it")
            service.cancelled.discard(job_id)
        else:
            error = job.error or {}
            if error.get("code") not in GIVEN_UP or job.fruitless_attempts <= MAX_RETRIES_WITHOUT_PROGRESS:
                service.complain(f"{job_id} failed after {job.fruitless_attempts} fruitless attempts: {error}")
        service.story.tell("asked_again", job=job_id, status=job.status.value, error=job.error)
        self.asked_again.append(job_id)
        service.clients[service.tenants[job_id]].retry(job_id)
        time.sleep(0.1)
