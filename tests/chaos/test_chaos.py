"""A service of three tenants under faults of all kinds: everything that was asked for is there, and nothing else.

`make test-chaos SEED=1` is the whole of it: 60 jobs, 80 faults, up to 20 minutes. What happened to which job is in
`story.jsonl` of the folder that the test prints; `python -m tests.chaos.plan SEED` is what was to happen.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.checks import check_files, check_messages, check_results, check_rows, own_processes, results
from tests.chaos.faults import STRIKES, Faults, Strike, recipe_body
from tests.chaos.hosts import HOST_KINDS, cable_pulled, host_lost, serving_on_hosts
from tests.chaos.plan import KINDS, RECIPES, TENANTS, WORKERS, Plan, draw
from tests.chaos.service import Service, serving
from tests.chaos.tenants import Tenants
from tests.e2e.conftest import train
from tests.e2e.installation import Process
from tests.hosts.cluster import S3
from tests.hosts.namespaces import missing
from tests.supervise.bench import wait_for

SEED = int(os.environ.get("BITWRIGHT_TEST_CHAOS_SEED", "1"))
FAULTS = int(os.environ.get("BITWRIGHT_TEST_CHAOS_FAULTS", str(len(KINDS))))
JOBS = int(os.environ.get("BITWRIGHT_TEST_CHAOS_JOBS", "15"))
LONGEST = 1200.0
"""Seconds for the faults, and as many for what is left to do then: the machine may be busy with other things."""


def undisturbed(service: Service, folder: Path) -> dict[str, dict[str, str]]:
    """Tensors of each recipe, by jobs that nothing disturbs."""
    jobs = {}
    for number, recipe in enumerate(RECIPES):
        jobs[recipe] = service.submit(TENANTS[number % len(TENANTS)], recipe, recipe_body(recipe))
    for job_id in jobs.values():
        wait_for(partial(_ended, service, job_id), 600, what=f"{job_id}, undisturbed")
    expected = {recipe: results(service, job_id, folder) for recipe, job_id in jobs.items()}
    assert all(expected.values()), expected
    return expected


def _ended(service: Service, job_id: str) -> bool:
    return service.job(job_id).finished_at is not None


def suffer(service: Service, plan: Plan, strikes: Mapping[str, Strike]) -> tuple[Faults, Tenants]:
    """Let the faults strike while tenants submit, and all become as it should be."""
    faults, story = Faults(service, strikes), service.story
    began = story.seconds
    with Tenants(service, plan) as tenants:
        for fault in plan.faults:
            late = story.seconds - began - fault.at
            if story.seconds - began > LONGEST:
                service.complain(f"{len(plan.faults) - fault.number} faults had no time")
                break
            time.sleep(max(0.0, -late))
            faults.begin(fault)
        faults.wait(LONGEST)
        story.tell("faults_over")
        service.installation.ensure("valkey", "sweep", "api", *WORKERS)
        wait_for(lambda: tenants.content or len(service.complaints) > 20, LONGEST, what="the success of every job")
    return faults, tenants


def clear(service: Service) -> None:
    """Restart the workers with no patience for scratch folders, wait until these are gone, and end everything."""
    installation = service.installation
    for name in WORKERS:
        process = installation[name]
        if process.stop(60):
            service.complain(f"{name} did not end well")
        process.environment = {**process.environment, "BITWRIGHT_WORKSPACE_RETENTION_DAYS": "0"}
        process.told = len(process.log.read_text())
        process.start()
    for name in WORKERS:
        wait_for(partial(_has_pruned, installation[name]), 240, what=f"{name} to tidy up")
    check_messages(service)
    for name in ("api", "sweep", *WORKERS):
        if code := installation[name].stop(60):
            service.complain(f"{name} ended with {code}")
    installation["valkey"].stop()
    deadline = time.monotonic() + 15
    while (left := own_processes(service)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        service.complain(f"processes are left: {left}")


def _has_pruned(process: Process) -> bool:
    return "disk_pruned" in process.log.read_text()[process.told :]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_service_under_faults_of_all_kinds_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    model = train(tmp_path / "models", blocks=4)
    with serving(tmp_path / "service", model) as service:
        judge(service, draw(SEED, faults=FAULTS, jobs=JOBS), STRIKES, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_so_does_one_on_three_hosts(tmp_path: Path) -> None:
    """With cables that are pulled and hosts that are lost with their disks, besides: `make test-chaos-hosts`."""
    reason = missing() or (None if os.environ.get(S3) else f"{S3} names no S3: `make test-chaos-hosts`")
    if reason:
        pytest.skip(reason)
    model = train(tmp_path / "models", blocks=4)
    with serving_on_hosts(tmp_path / "service", model) as service:
        strikes = {**STRIKES, "cable_pulled": cable_pulled, "host_lost": host_lost}
        judge(service, draw(SEED, faults=FAULTS, jobs=JOBS, kinds=HOST_KINDS), strikes, tmp_path)


def judge(service: Service, plan: Plan, strikes: Mapping[str, Strike], folder: Path) -> None:
    """Let the plan happen, and look at all that is left."""
    sys.stdout.write(f"what happens: {folder}/service/story.jsonl\n")
    expected = undisturbed(service, folder / "undisturbed")
    began = service.story.seconds
    faults, tenants = suffer(service, plan, strikes)
    seconds = service.story.seconds - began
    compared = check_results(service, expected, folder / "downloads")
    clear(service)
    counts = check_rows(service) | check_files(service)
    found = {kind: [what for fault, what in faults.found if fault.kind == kind] for kind in plan.kinds}
    summary = {
        **{"seed": plan.seed, "faults": len(faults.found), "kinds": len([k for k, v in found.items() if v])},
        **{"seconds": round(seconds), "asked_again": len(tenants.asked_again), "files_compared": compared, **counts},
        "missed": sum(what in ("no attempt", "no job", "0 answers") for _, what in faults.found),
    }
    service.story.tell("summary", **summary, found=found)
    sys.stdout.write(json.dumps(summary) + "\n")
    assert service.complaints == []
