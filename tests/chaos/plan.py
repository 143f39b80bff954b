"""Plan of a run of chaos: which job is submitted when, and which fault strikes what and when, drawn from a seed.

`python -m tests.chaos.plan SEED [FAULTS]` shows it. Only what a fault finds when it strikes differs from run to run.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

SECONDS_BETWEEN = 5.0
TENANTS = ("amber", "birch", "cedar")
WORKERS = ("worker0", "worker1")
LEASE_SECONDS = 6
PAST_THE_LEASE = LEASE_SECONDS + 3.0
EVERYTHING = ("api", "postgres", "sweep", "valkey", *WORKERS)

RECIPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "rtn-4": {"method": "rtn", "bits": 4, "group_size": 32},
        "rtn-4-awq": {"method": "rtn", "bits": 4, "group_size": 32, "formats": ["awq"]},
        "gptq-4": {"method": "gptq", "bits": 4, "group_size": 32},
        "signround-4": {"method": "signround", "bits": 4, "group_size": 32, "steps": 60},
        "signround-3": {"method": "signround", "bits": 3, "group_size": 32, "steps": 100, "seed": 7},
        "awq-4": {"method": "awq", "bits": 4, "group_size": 32},
    }
)
"""What the jobs ask for, by name. A recipe's result is known from a run that nothing disturbed."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    targets   groups of parts that it strikes, of which one is drawn
    seconds   from the strike until it is over, about
    what      what happens, for people
    """

    targets: Sequence[tuple[str, ...]]
    seconds: float
    what: str


EACH_WORKER = tuple((name,) for name in WORKERS)
LINKED = tuple((name,) for name in ("api", "sweep", *WORKERS))
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "attempt_killed": Kind(
            EACH_WORKER, 0.0, "SIGKILL to a process of an attempt, as the kernel does without memory"
        ),
        "attempt_frozen": Kind(EACH_WORKER, 3.0, "an attempt's process is stopped and goes on"),
        "worker_killed": Kind(EACH_WORKER, 4.0, "SIGKILL to a worker"),
        "worker_asleep": Kind(EACH_WORKER, PAST_THE_LEASE, "a worker is stopped for longer than its lease, and wakes"),
        "worker_ended": Kind(EACH_WORKER, 6.0, "SIGTERM to a worker, and time to end"),
        "worker_ended_roughly": Kind(EACH_WORKER, 4.0, "SIGTERM to a worker, and SIGKILL before it has ended"),
        "clock_ahead": Kind(EACH_WORKER, 8.0, "a worker's clock jumps an hour ahead, and back"),
        "clock_behind": Kind(EACH_WORKER, 8.0, "a worker's clock jumps an hour back, and ahead again"),
        "cancelled_unheard": Kind([WORKERS], 5.0, "a job is cancelled while no worker lives"),
        "broker_killed": Kind([("valkey",)], 4.0, "SIGKILL to the broker: it comes back empty"),
        "broker_asleep": Kind([("valkey",)], 6.0, "the broker is stopped, and goes on"),
        "broker_flushed": Kind([("valkey",)], 0.0, "all messages are lost"),
        "broker_full": Kind([("valkey",)], 6.0, "the broker answers and takes nothing"),
        "messages_doubled": Kind([("valkey",)], 0.0, "messages are delivered many times"),
        "submitted_unheard": Kind([("valkey", "sweep")], 4.0, "a job is submitted while broker and sweep are dead"),
        "answer_lost": Kind(EACH_WORKER, 3.0, "the database commits, and the worker is not told"),
        "link_cut": Kind(LINKED, 3.0, "connections to the database are cut, and refused for a while"),
        "link_silent": Kind(LINKED, PAST_THE_LEASE, "nothing gets through to the database, for longer than a lease"),
        "connections_ended": Kind([("postgres",)], 0.0, "the database ends all connections"),
        "database_crashed": Kind([("postgres",)], 5.0, "the database's processes end at once, and it recovers"),
        "database_restarted": Kind([("postgres",)], 4.0, "the database is restarted"),
        "database_asleep": Kind([("postgres",)], PAST_THE_LEASE, "the database stops for longer than a lease"),
        "api_killed": Kind([("api",)], 3.0, "SIGKILL to the API"),
        "api_ended": Kind([("api",)], 5.0, "SIGTERM to the API, with an event stream open"),
        "sweep_killed": Kind([("sweep",)], 3.0, "SIGKILL to the sweep"),
        "sweep_asleep": Kind([("sweep",)], PAST_THE_LEASE, "the sweep is stopped for longer than its own lease"),
        "power_cut": Kind([EVERYTHING], 9.0, "SIGKILL to everything at once"),
        "all_ended": Kind([("api", "sweep", *WORKERS)], 9.0, "SIGTERM to all of the service, as for an upgrade"),
    }
)
"""Faults by name: those of long-known incidents with queues of jobs, and of broker, database, clocks and shutdown."""


@dataclass(frozen=True)
class Fault:
    """A fault that strikes `at` seconds after the beginning. `draw`, from 0 to 1, decides what is left to decide."""

    number: int
    at: float
    kind: str
    parts: tuple[str, ...]
    draw: float


@dataclass(frozen=True)
class Submission:
    """A job that a tenant submits `at` seconds after the beginning."""

    at: float
    tenant: str
    recipe: str


@dataclass(frozen=True)
class Plan:
    """What a seed decides."""

    seed: int
    submissions: tuple[Submission, ...]
    faults: tuple[Fault, ...]
    kinds: Mapping[str, Kind]

    @property
    def seconds(self) -> float:
        """From the beginning to the last fault."""
        return self.faults[-1].at if self.faults else 0.0


def draw(seed: int, *, faults: int = 80, jobs: int = 60, kinds: Mapping[str, Kind] = KINDS) -> Plan:
    """The plan of a seed: jobs over nine tenths of the time; all kinds of faults before one comes again."""
    random = Random(seed)
    struck = tuple(_faults(random, faults, kinds))
    last = 0.9 * faults * SECONDS_BETWEEN
    # The first jobs wait at once, so that early faults find something to do.
    times = sorted(0.0 if number < 6 else random.uniform(0, last) for number in range(jobs))
    names = list(RECIPES)
    submissions = (
        Submission(round(at, 1), TENANTS[number % len(TENANTS)], names[random.randrange(len(names))])
        for number, at in enumerate(times)
    )
    return Plan(seed, tuple(submissions), struck, kinds)


def _faults(random: Random, count: int, kinds: Mapping[str, Kind]) -> list[Fault]:
    """Faults whose parts are not still suffering from an earlier one."""
    free_at = dict.fromkeys(EVERYTHING, 0.0)
    waiting: list[str] = []
    drawn: list[Fault] = []
    at = 0.0
    for number in range(count):
        at = max(at, round(SECONDS_BETWEEN * number + random.uniform(2.0, 4.0), 1))
        waiting = waiting or random.sample(list(kinds), len(kinds))
        while (found := _next(random, kinds, waiting, free_at, at)) is None:
            at = round(at + 1.0, 1)
        name, parts = found
        drawn.append(Fault(number, at, name, parts, round(random.random(), 3)))
        free_at |= dict.fromkeys(parts, at + kinds[name].seconds)
    return drawn


def _next(
    random: Random, kinds: Mapping[str, Kind], waiting: list[str], free_at: Mapping[str, float], at: float
) -> tuple[str, tuple[str, ...]] | None:
    """A kind and its parts: the first one that waits and finds a target free, else any that does.

    The last two that wait are waited for: such as a power cut, which finds all parts free only if nothing else strikes.
    """
    others = random.sample(list(kinds), len(kinds)) if len(waiting) > 2 else []
    for name in (*waiting, *others):
        targets = [parts for parts in kinds[name].targets if all(free_at[part] <= at for part in parts)]
        if targets:
            if name in waiting:
                waiting.remove(name)
            return name, random.choice(targets)
    return None


def main(seed: int, faults: int = 80) -> None:
    """Print the plan of a seed."""
    plan = draw(seed, faults=faults)
    lines = [(job.at, f"job    {job.tenant} {job.recipe}") for job in plan.submissions]
    lines += [(fault.at, f"fault  {fault.kind} {' '.join(fault.parts)}") for fault in plan.faults]
    sys.stdout.writelines(f"{at:7.1f} {text}\n" for at, text in sorted(lines))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
