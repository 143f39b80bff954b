"""Faults by kind: each strikes, waits, sets right again, and says what it found."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psycopg
import redis

from app.queue import WORK_TASK, celery_app
from bitwright.errors import IllegalTransition
from bitwright.job_states import FINAL_STATUSES
from tests import servers
from tests.chaos.plan import EVERYTHING, KINDS, PAST_THE_LEASE, RECIPES, TENANTS, WORKERS, Fault
from tests.chaos.service import Service, patiently
from tests.e2e.installation import children

ORDERLY_SECONDS = 60.0
"""Time for an orderly end: the machine may be busy with other things."""
HOUR = 3600

Strike = Callable[[Service, Fault], str]
"""Strikes, waits, sets right again; what it found."""


class Faults:
    """Strikes what a plan says, each fault in a thread of its own; two that want the same part come one by one."""

    def __init__(self, service: Service, strikes: "Mapping[str, Strike] | None" = None) -> None:
        self._service = service
        self._strikes = STRIKES if strikes is None else strikes
        self._locks = {name: threading.Lock() for name in EVERYTHING}
        self._threads: list[threading.Thread] = []
        self.found: list[tuple[Fault, str]] = []

    def begin(self, fault: Fault) -> None:
        """Strike now."""
        thread = threading.Thread(target=self._strike, args=(fault,), name=fault.kind)
        self._threads.append(thread)
        thread.start()

    def _strike(self, fault: Fault) -> None:
        with ExitStack() as stack:
            for part in sorted(fault.parts):
                stack.enter_context(self._locks[part])
            story = self._service.story
            story.tell("fault", number=fault.number, kind=fault.kind, parts=fault.parts, jobs=self._jobs(fault.parts))
            try:
                found = self._strikes[fault.kind](self._service, fault)
            except Exception as error:
                self._service.complain(f"{fault.kind} of {fault.parts}: {type(error).__name__}: {error}")
                found = "broken"
            self.found.append((fault, found))
            story.tell("fault_over", number=fault.number, kind=fault.kind, found=found)

    def _jobs(self, parts: Sequence[str]) -> list[str]:
        held = [self._service.held_by(part) for part in parts if part in WORKERS]
        return [job for job in held if job is not None]

    def wait(self, seconds: float) -> None:
        """Wait until all is set right again."""
        for thread in self._threads:
            thread.join(seconds)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} is not over")


def _attempt(service: Service, fault: Fault) -> int | None:
    """A process of an attempt of the worker that the fault strikes; waits a little for one."""
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        pids = service.computing(fault.parts[0])
        if pids:
            return pids[int(fault.draw * len(pids))]
        time.sleep(0.1)
    return None


def attempt_killed(service: Service, fault: Fault) -> str:
    pid = _attempt(service, fault)
    if pid is None:
        return "no attempt"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"process {pid}"


def attempt_frozen(service: Service, fault: Fault) -> str:
    pid = _attempt(service, fault)
    if pid is None:
        return "no attempt"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)
    return f"process {pid}"


def worker_killed(service: Service, fault: Fault) -> str:
    _kill(service, *fault.parts)
    time.sleep(2)
    service.installation.start(*fault.parts)
    return "killed"


def asleep(service: Service, fault: Fault) -> str:
    process = service.part(fault.parts[0])
    process.send(signal.SIGSTOP)
    time.sleep(KINDS[fault.kind].seconds)
    process.send(signal.SIGCONT)
    return "slept"


def ended(service: Service, fault: Fault) -> str:
    """SIGTERM to all the parts at once: each ends with exit code 0, and soon; one that only starts, at once."""
    processes = [service.part(name) for name in fault.parts]
    ready = [_catches(process.pid, signal.SIGTERM) for process in processes]
    for process in processes:
        process.send(signal.SIGTERM)
    for process, prepared in zip(processes, ready, strict=True):
        assert process.process is not None
        code = process.process.wait(ORDERLY_SECONDS)
        if code and (prepared or code != -signal.SIGTERM):
            service.complain(f"{process.name} ended with {code} on SIGTERM")
    service.installation.start(*fault.parts)
    return "ended"


def _catches(pid: int, number: signal.Signals) -> bool:
    """True if a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def worker_ended_roughly(service: Service, fault: Fault) -> str:
    process = service.part(fault.parts[0])
    process.send(signal.SIGTERM)
    time.sleep(0.5 * fault.draw)
    with suppress(ProcessLookupError):
        process.kill()
    time.sleep(1)
    process.start()
    return "killed as it ended"


def clock_jumps(service: Service, fault: Fault) -> str:
    file = service.clocks[fault.parts[0]]
    file.write_text(str(HOUR if fault.kind == "clock_ahead" else -HOUR))
    time.sleep(KINDS[fault.kind].seconds)
    file.write_text("0")
    return "set right"


def cancelled_unheard(service: Service, fault: Fault) -> str:
    """A job that was cancelled while no worker lived must end so, although it ran when its worker died."""
    _kill(service, *WORKERS)
    try:
        return _cancel_one(service, fault.draw)
    finally:
        time.sleep(1)
        service.installation.start(*WORKERS)


def _cancel_one(service: Service, draw: float) -> str:
    going = [job for job in sorted(service.jobs) if service.status(job) not in FINAL_STATUSES]
    going = [job for job in going if job not in service.cancelled]
    if not going:
        return "no job"
    job = going[int(draw * len(going))]
    service.cancelled.add(job)
    try:
        # An answer may be lost with its connection: whoever asks again gets it.
        patiently(lambda: service.clients[service.tenants[job]].cancel(job))
    except IllegalTransition:
        service.cancelled.discard(job)
        return "it had ended"
    service.story.tell("cancelled", job=job)
    return job


def broker_killed(service: Service, _: Fault) -> str:
    _kill(service, "valkey")
    time.sleep(3)
    service.installation.start("valkey")
    return "came back empty"


def broker_flushed(service: Service, _: Fault) -> str:
    with _broker(service) as broker:
        length = broker.llen("work.cpu")
        broker.flushall()
    return f"{length} messages"


def broker_full(service: Service, _: Fault) -> str:
    with _broker(service) as broker:
        broker.config_set("maxmemory", "1")
        time.sleep(6)
        broker.config_set("maxmemory", "0")
    return "has room again"


def messages_doubled(service: Service, _: Fault) -> str:
    app = celery_app(service.installation.variables["BITWRIGHT_BROKER_URL"])
    for _number in range(20):
        app.send_task(WORK_TASK, args=["cpu"], queue="work.cpu", ignore_result=True)
    app.close()
    return "20 messages"


def submitted_unheard(service: Service, fault: Fault) -> str:
    """A job whose message could not be sent is found all the same."""
    _kill(service, "valkey", "sweep")
    try:
        names = list(RECIPES)
        recipe = names[int(fault.draw * len(names))]
        tenant = TENANTS[fault.number % len(TENANTS)]
        return service.submit(tenant, recipe, recipe_body(recipe))
    finally:
        time.sleep(1)
        service.installation.start("valkey", "sweep")


def recipe_body(recipe: str) -> dict[str, object]:
    """The request of a recipe, without its model."""
    text = {"num_samples": 8, "sequence_length": 64}
    return {"formats": [], "calibration": text, "evaluation": text | {"num_samples": 2}, **RECIPES[recipe]}


def answer_lost(service: Service, fault: Fault) -> str:
    link = service.links[fault.parts[0]]
    before = link.answers_lost
    link.lose_answers(1 + int(fault.draw * 3))
    time.sleep(KINDS[fault.kind].seconds)
    link.mend()
    return f"{link.answers_lost - before} answers"


def link_cut(service: Service, fault: Fault) -> str:
    link = service.links[fault.parts[0]]
    link.cut()
    time.sleep(KINDS[fault.kind].seconds)
    link.mend()
    return "mended"


def link_silent(service: Service, fault: Fault) -> str:
    link = service.links[fault.parts[0]]
    link.silence()
    time.sleep(KINDS[fault.kind].seconds)
    link.mend()
    return "mended"


def connections_ended(service: Service, _: Fault) -> str:
    query = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""
    with psycopg.connect(servers.libpq(service.cluster.url), autocommit=True) as connection:
        return f"{len(connection.execute(query).fetchall())} connections"


def database_crashed(service: Service, _: Fault) -> str:
    return _database_down(service, signal.SIGQUIT)


def database_restarted(service: Service, _: Fault) -> str:
    return _database_down(service, signal.SIGINT)


def _database_down(service: Service, number: signal.Signals) -> str:
    service.postgres.send(number)
    assert service.postgres.process is not None
    service.postgres.process.wait(ORDERLY_SECONDS)
    time.sleep(2)
    service.start_postgres()
    return "recovered"


def database_asleep(service: Service, _: Fault) -> str:
    pids = [service.postgres.pid, *children(service.postgres.pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    time.sleep(PAST_THE_LEASE)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return f"{len(pids)} processes slept"


def api_killed(service: Service, _: Fault) -> str:
    _kill(service, "api")
    time.sleep(2)
    service.installation.start("api")
    return "killed"


def api_ended(service: Service, fault: Fault) -> str:
    """An event stream that is open does not keep the API from ending."""
    going = [job for job in sorted(service.jobs) if service.status(job) not in FINAL_STATUSES]
    with ExitStack() as stack:
        opened = bool(going) and stack.enter_context(_stream(service, going[0]))
        ended(service, fault)
    return "with a stream" if opened else "without a stream"


@contextmanager
def _stream(service: Service, job: str) -> Iterator[bool]:
    """An open event stream of a job that nobody reads; False if the API did not answer."""
    url = f"{service.api}/v1/jobs/{job}/events"
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {service.keys[service.tenants[job]]}"}
    with httpx.Client(timeout=20) as client, ExitStack() as stack:
        opened = False
        with suppress(httpx.HTTPError):
            opened = stack.enter_context(client.stream("GET", url, headers=headers)).status_code == 200
        yield opened


def power_cut(service: Service, _: Fault) -> str:
    """SIGKILL to every process at once, those of attempts and of the database included; then all start again."""
    names = ("valkey", "sweep", "api", *WORKERS)
    running = [service.part(name) for name in (*names, "postgres")]
    pids = [pid for process in running if process.running() for pid in (process.pid, *children(process.pid))]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in running:
        assert process.process is not None
        process.process.wait(ORDERLY_SECONDS)
    time.sleep(1)
    service.installation.start("valkey", "sweep", "api", *WORKERS)  # a database that is still down is waited for
    service.start_postgres()
    return f"{len(pids)} processes"


def sweep_killed(service: Service, _: Fault) -> str:
    _kill(service, "sweep")
    time.sleep(2)
    service.installation.start("sweep")
    return "killed"


def _kill(service: Service, *names: str) -> None:
    for name in names:
        if service.part(name).running():
            service.part(name).kill()


@contextmanager
def _broker(service: Service) -> Iterator["redis.Redis"]:
    with redis.Redis(port=service.installation.broker_port, socket_timeout=10) as broker:
        yield broker


STRIKES: Mapping[str, Strike] = {
    "attempt_killed": attempt_killed,
    "attempt_frozen": attempt_frozen,
    "worker_killed": worker_killed,
    "worker_asleep": asleep,
    "worker_ended": ended,
    "worker_ended_roughly": worker_ended_roughly,
    "clock_ahead": clock_jumps,
    "clock_behind": clock_jumps,
    "cancelled_unheard": cancelled_unheard,
    "broker_killed": broker_killed,
    "broker_asleep": asleep,
    "broker_flushed": broker_flushed,
    "broker_full": broker_full,
    "messages_doubled": messages_doubled,
    "submitted_unheard": submitted_unheard,
    "answer_lost": answer_lost,
    "link_cut": link_cut,
    "link_silent": link_silent,
    "connections_ended": connections_ended,
    "database_crashed": database_crashed,
    "database_restarted": database_restarted,
    "database_asleep": database_asleep,
    "api_killed": api_killed,
    "api_ended": api_ended,
    "sweep_killed": sweep_killed,
    "sweep_asleep": asleep,
    "power_cut": power_cut,
    "all_ended": ended,
}
