"""Placement of activations by available memory; the same machine plans the same again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.domain.request.job_request import JobRequest
from tests.engine.model.random_models import save_random_model
from workers.disk.orders import AttemptOrder
from workers.engine import memory
from workers.engine.finetune import memory_plan
from workers.engine.memory import ACTIVATION_BYTES, PASS_BYTES, ActivationSize, working_bytes
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.plan import Plan, make_plan

GB = 1 << 30
PlanWith = Callable[..., Plan]


@pytest.fixture
def plan_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanWith:
    """Plans for a GPU of 80 GB with so much free, and activations of such sizes."""
    save_random_model(tmp_path, "llama")
    model = StreamedModel.open(Checkpoint.open(tmp_path), torch.device("cpu"))
    model.device = torch.device("cuda", 0)
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse({"model": str(tmp_path), "method": "rtn", "group_size": 16}),
        model_path=str(tmp_path),
        device="cuda",
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB))

    def plan(free: int, *sizes: ActivationSize, world_size: int = 1) -> Plan:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * GB))
        return make_plan(order.model_copy(update={"world_size": world_size}), model, torch.float32, list(sizes))

    plan.model = model  # type: ignore[attr-defined]
    return plan


def test_activations_stay_on_the_device_while_they_fit(plan_with: PlanWith) -> None:
    size = ActivationSize(sequences=1 << 12, length=100, tensors=2)  # of width 32, fp32
    needed = (1 << 12) * 100 * 2 * 32 * 4
    small = plan_with(4 * GB, size)
    assert (small.activations, small.activation_bytes) == ("device", needed)
    assert small.activation_budget is not None
    assert needed <= small.activation_budget < 4 * GB
    more = replace(size, sequences=small.activation_budget * size.sequences // needed + size.sequences)
    assert plan_with(4 * GB, more).activations == "host"
    assert plan_with(4 * GB, size, more).activation_bytes == needed + needed // size.sequences * more.sequences
    assert plan_with(40 * GB, more).activations == "device"
    assert plan_with(0, size).activation_budget == 0


def test_wide_streams_leave_the_device_alone(plan_with: PlanWith) -> None:
    """Their copies are hidden behind the work; what is free belongs to others."""
    size = ActivationSize(sequences=ACTIVATION_BYTES // (100 * 2 * 32 * 4), length=100, tensors=2)
    assert plan_with(80 * GB, size).activations == "device"
    assert plan_with(80 * GB, replace(size, sequences=size.sequences + 1)).activations == "host"


def test_passes_take_as_much_at_once_as_their_memory_holds(plan_with: PlanWith) -> None:
    a_token = (4 * 32 + 3 * 64) * 4
    assert plan_with(8 * GB, ActivationSize(1, 100, 1)).pass_batch == PASS_BYTES // (100 * a_token)
    assert plan_with(8 * GB, ActivationSize(1, PASS_BYTES, 1)).pass_batch == 1


def test_a_little_more_or_less_free_memory_changes_nothing(plan_with: PlanWith) -> None:
    size = ActivationSize(sequences=100, length=100, tensors=3)
    first = plan_with(8 * GB + 10, size)
    assert plan_with(8 * GB + 900_000_000, size) == first
    assert plan_with(7 * GB, size) != first
    assert plan_with(7 * GB, size).decides_codes() == first.decides_codes(), "codes are the same wherever they are"
    assert first.decides_codes().keys() >= {"device", "dtype", "scale_dtype", "micro_batch", "torch_version"}
    assert not {name for name in first.decides_codes() if name.startswith("activation")}


def test_ranks_share_what_streams_need(plan_with: PlanWith) -> None:
    """Three sequences on two ranks: one of them has two."""
    three, two = (ActivationSize(sequences=sequences, length=100, tensors=3) for sequences in (3, 2))
    shared = plan_with(8 * GB, three, world_size=2)
    assert shared.world_size == 2
    assert shared.activation_bytes == plan_with(8 * GB, two).activation_bytes


def test_what_the_device_needs_besides_grows_with_what_tuning_holds(
    plan_with: PlanWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: StreamedModel = plan_with.model  # type: ignore[attr-defined]
    block = sum(p.numel() for p in model.blocks[0].parameters())
    monkeypatch.setattr(memory, "PASS_BYTES", 0)
    least = working_bytes(model, 1, 1)
    assert least > block * (2 * 4 + 4 + 4 + 4), "two blocks; value, gradient and offset of every weight"
    assert working_bytes(model, 4096, 32) - working_bytes(model, 4096, 16) == 16 * 4096 * (24 * 32 + 6 * 64) * 4


@pytest.mark.parametrize(
    ("activations", "fixed", "captures"), [(20, 40, True), (25, 35, True), (26, 0, False), (20, 46, False)]
)
def test_passes_are_captured_where_eager_ones_fit_beside_their_pool(
    activations: int, fixed: float, captures: bool
) -> None:
    """Of 100 bytes of memory, 85 of which the stage may count on."""
    needs = memory_plan._Needs(
        "cuda", 100, blocks=1, length=8, kept=0, fixed={False: fixed}, graph=activations, inputs=0
    )
    assert needs.has_room_for_pool(memory_plan.TrainingPlan(1, 0, keeps=False)) is captures


def test_of_blocks_that_are_computed_again_one_graph_exists_at_a_time_beside_all_inputs() -> None:
    needs = memory_plan._Needs("cuda", 100, blocks=8, length=8, kept=0, fixed={False: 0.0}, graph=5, inputs=8)
    plans = [memory_plan.TrainingPlan(1, recomputed, keeps=False) for recomputed in (0, 3, 8)]
    assert [needs.activations(plan) for plan in plans] == [40, 38, 13]
    assert needs.activations(memory_plan.TrainingPlan(2, 8, keeps=False)) == 26
    assert [needs.has_room_for_pool(plan) for plan in plans] == [False, False, True]
