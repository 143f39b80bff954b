"""A plan is its seed's alone, and one that can be carried out."""

from collections import Counter

import pytest

from tests.chaos.faults import STRIKES
from tests.chaos.hosts import HOST_KINDS
from tests.chaos.plan import EVERYTHING, KINDS, RECIPES, SECONDS_BETWEEN, TENANTS, draw

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_kind_strikes_and_no_part_that_suffers_still(seed: int) -> None:
    plan = draw(seed)
    counts = Counter(fault.kind for fault in plan.faults)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 2
    free = dict.fromkeys(EVERYTHING, 0.0)
    for fault in plan.faults:
        assert all(free[part] <= fault.at for part in fault.parts)
        free |= dict.fromkeys(fault.parts, fault.at + KINDS[fault.kind].seconds)
    assert len(plan.faults) == 80
    assert plan.seconds < 1.2 * 80 * SECONDS_BETWEEN
    assert Counter(job.tenant for job in plan.submissions) == dict.fromkeys(TENANTS, 20)
    assert {job.recipe for job in plan.submissions} == set(RECIPES)


def test_a_seed_gives_one_plan_and_each_its_own() -> None:
    assert [draw(seed) for seed in SEEDS] == [draw(seed) for seed in SEEDS]
    assert len({draw(seed).faults for seed in SEEDS}) == len(SEEDS)


def test_every_kind_is_carried_out() -> None:
    assert STRIKES.keys() == KINDS.keys()


def test_on_hosts_of_their_own_parts_suffer_what_hosts_do_besides() -> None:
    plan = draw(1, kinds=HOST_KINDS)
    assert {fault.kind for fault in plan.faults} == {*KINDS, "cable_pulled", "host_lost"}
