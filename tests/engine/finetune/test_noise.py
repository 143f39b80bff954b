"""Random numbers, rates and the best parameters of training: each step draws anew, and evaluation draws nothing."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from app.domain.adapters import BayesianLoRASpec
from tests.engine.finetune.small_lora import SmallLoRA
from tests.engine.finetune.test_trainer import Interrupted, as_class, assert_same, interrupt_at, run
from tests.engine.model.random_models import save_random_model
from workers.adapters.attaching import Attach
from workers.contracts.adapters import TrainableAdapter
from workers.engine.finetune import trainer
from workers.engine.finetune.flat_adamw import FlatParameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    save_random_model(found, "llama", dtype=torch.bfloat16)
    return found


class WatchedLoRA(SmallLoRA):
    """Keeps what it draws, and whether it was training when gradients were recorded and when not."""

    draws: ClassVar[list[float]] = []
    modes: ClassVar[list[tuple[bool, bool]]] = []
    shares: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((torch.is_grad_enabled(), self.training))
        if self.training:
            self.draws.append(float(torch.rand(())))
        return super().forward(x)

    def progress(self, share: float) -> None:
        if not self.shares or self.shares[-1] != share:
            self.shares.append(share)


@pytest.fixture(autouse=True)
def _forget() -> None:
    for kept in (WatchedLoRA.draws, WatchedLoRA.modes, WatchedLoRA.shares):
        kept.clear()


LINEARS = 4 * 7


def test_every_linear_micro_batch_and_step_has_its_own_noise(folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps": 4, "micro_batch": 2, "validation_every": 2}
    run(folder, tmp_path / "one", attach=as_class(WatchedLoRA), **fields)
    draws = list(WatchedLoRA.draws)
    assert len(draws) == 4 * 2 * LINEARS
    assert len(set(draws)) > 0.99 * len(draws)
    WatchedLoRA.draws.clear()
    # Whoever draws beside, and whatever was drawn before: the same request draws the same.
    torch.rand(17)
    run(folder, tmp_path / "two", attach=as_class(WatchedLoRA), **fields)
    assert draws == WatchedLoRA.draws


def test_noise_differs_by_seed_step_and_rank() -> None:
    seeds = {trainer._step_seed(seed, step, rank) for seed in range(3) for step in range(12) for rank in range(8)}
    assert len(seeds) == 3 * 12 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_held_out_text_is_judged_without_noise_and_training_goes_on_with_it(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, attach=as_class(WatchedLoRA), steps=4, validation_every=1, checkpoint_every=2)
    assert {(True, True), (False, False)} == set(WatchedLoRA.modes)


def test_training_leaves_the_callers_random_numbers_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run(folder, tmp_path, attach=as_class(WatchedLoRA), steps=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_adapters_are_told_how_much_of_the_training_is_done(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, attach=as_class(WatchedLoRA), steps=4, checkpoint_every=1)
    assert WatchedLoRA.shares == [0.0, 0.25, 0.5, 0.75]


# ---- Rates -----------------------------------------------------------------------------------------------------------


class TwoRates(TrainableAdapter):
    """A parameter at the schedule's rate, and one with a rate of its own."""

    rates = MappingProxyType({"gate": 0.1})

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0))
        self.gate = torch.nn.Parameter(torch.full((2,), 2.0))


def flat(**how: Any) -> tuple[TwoRates, FlatParameters]:
    module = TwoRates()
    parameters = FlatParameters([module], **({"decay": 0.0, "clip_norm": None} | how))
    parameters.clear()
    return module, parameters


def test_a_rate_of_its_own_follows_the_schedule_by_its_share() -> None:
    """AdamW's first step moves every parameter by its learning rate."""
    module, parameters = flat()
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(3.0)
    parameters.step(0.02, 0.25)
    assert module.weight.tolist() == pytest.approx([2 - 0.02] * 3, rel=1e-6)
    assert module.gate.tolist() == pytest.approx([2 - 0.1 * 0.25] * 2, rel=1e-6)


def test_what_has_a_rate_of_its_own_does_not_decay() -> None:
    module, parameters = flat(decay=0.5)
    parameters.step(0.02, 1.0)
    assert module.weight.tolist() == pytest.approx([2 * (1 - 0.02 * 0.5)] * 3, rel=1e-6)
    assert module.gate.tolist() == [2.0] * 2


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(damage: float, clip_norm: float | None) -> None:
    module, parameters = flat(clip_norm=clip_norm)
    assert module.weight.grad is not None
    assert module.gate.grad is not None
    module.gate.grad.fill_(1.0)
    module.weight.grad[1] = damage
    assert not parameters.step(0.02, 1.0).isfinite()
    assert module.weight.tolist() == [2.0] * 3
    assert module.gate.tolist() == [2.0] * 2


def test_the_norm_is_over_all_parameters_and_limits_them_together() -> None:
    module, parameters = flat(clip_norm=1.0)
    assert module.weight.grad is not None
    assert module.gate.grad is not None
    module.weight.grad.copy_(torch.tensor([0.0, 3.0, 0.0]))
    module.gate.grad.copy_(torch.tensor([4.0, 0.0]))
    assert float(parameters.step(0.02, 1.0)) == pytest.approx(5.0)
    assert module.weight.grad.tolist() == pytest.approx([0, 0.6, 0], rel=1e-5)
    assert module.gate.grad.tolist() == pytest.approx([0.8, 0], rel=1e-5)


def test_a_restored_step_goes_on_with_every_moment() -> None:
    """Against one that was never stored."""
    ends = []
    for stored in (False, True):
        module, parameters = flat(decay=0.1)
        for step in range(4):
            if stored and step == 2:
                state = parameters.state()
                module, parameters = flat(decay=0.1)
                parameters.restore(state)
            for index, parameter in enumerate(module.parameters()):
                assert parameter.grad is not None
                parameter.grad.copy_(torch.linspace(-1, 1, parameter.numel()) * (1 + step * index))
            parameters.step(0.02, 0.5)
        ends.append([parameter.tolist() for parameter in module.parameters()])
    assert ends[0] == ends[1]


def test_the_gates_of_a_job_move_at_their_rate_times_the_share_of_the_step(folder: Path, tmp_path: Path) -> None:
    """The rates that the optimizer has in each step of a decaying schedule: of the pair, of gates and of ranges."""
    found: list[list[float]] = []
    step = FlatParameters.step

    def watched(self: FlatParameters, rate: float, share: float) -> Tensor:
        norm = step(self, rate, share)
        found.append(sorted(settings["lr"] for settings in self._adam.param_groups))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatParameters, "step", watched)
        spec = BayesianLoRASpec(rank=2, gate_learning_rate=0.5)
        run(folder, tmp_path, attach=Attach(spec), steps=4, schedule="linear", warmup_share=0.0, held_out=False)
    shares = (1.0, 0.75, 0.5, 0.25)
    assert found == [pytest.approx([0.01 * share, 0.02 * share, 0.5 * share]) for share in shares]


# ---- The best parameters ---------------------------------------------------------------------------------------------


def losses_are(patch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Validations find these, one after the other."""
    given = iter(losses)
    patch.setattr(trainer, "mean_loss", lambda *_: next(given))


JUDGED: dict[str, Any] = {
    **{"steps": 8, "validation_every": 2, "checkpoint_every": 4, "patience": 9, "warmup_share": 0.0},
    "attach": as_class(WatchedLoRA),
}


def test_the_best_parameters_survive_a_resume(folder: Path, tmp_path: Path) -> None:
    """The lowest loss is after two steps; the attempt is killed after the checkpoint of the fourth."""
    with pytest.MonkeyPatch.context() as patch:
        losses_are(patch, [3, 1, 2, 2, 2])
        whole = run(folder, tmp_path / "whole", **JUDGED)
        losses_are(patch, [3, 1, 2])
        with pytest.MonkeyPatch.context() as killed:
            interrupt_at(killed, 5)
            with pytest.raises(Interrupted):
                run(folder, tmp_path / "cut", **JUDGED)
        losses_are(patch, [2, 2])
        resumed = run(folder, tmp_path / "cut", **JUDGED)
        losses_are(patch, [3, 1])
        best = run(folder, tmp_path / "best", **(JUDGED | {"steps": 2}))
    assert resumed.outcome.resumed == 4
    assert_same(whole, resumed)
    for name, tensors in best.adapters.items():
        assert all(torch.equal(tensor, resumed.adapters[name][key]) for key, tensor in tensors.items())
    progress = resumed.outcome.progress
    assert (progress.step, progress.best_step, progress.stale, progress.done) == (8, 2, 3, True)


@pytest.mark.parametrize(
    ("losses", "patience", "kept", "step", "stale"),
    [
        ([3, 2, 2, 1, 1], 2, 6, 8, 1),  # no worse is no better; better begins the count anew
        ([3, 2, 2, 2, 1], 2, 2, 6, 2),
        ([1, 2, 3], 2, 0, 4, 2),  # the start itself
    ],
)
def test_what_counts_as_the_best_and_when_it_is_given_up(
    losses: list[float], patience: int, kept: int, step: int, stale: int, folder: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        losses_are(patch, losses)
        progress = run(folder, tmp_path, **(JUDGED | {"patience": patience})).outcome.progress
    assert (progress.best_step, progress.step, progress.stale) == (kept, step, stale)
    assert [validation.loss for validation in progress.validations] == losses[: len(progress.validations)]


def test_without_patience_the_last_parameters_stay(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        losses_are(patch, [3, 1, 2, 2, 2])
        found = run(folder, tmp_path / "one", **(JUDGED | {"patience": None}))
    last = run(folder, tmp_path / "two", **(JUDGED | {"patience": None, "held_out": False}))
    for name, tensors in last.adapters.items():
        assert all(torch.equal(tensor, found.adapters[name][key]) for key, tensor in tensors.items())


def test_a_penalty_counts_once_over_all_ranks() -> None:
    """Each adds its part, and gradients are summed."""
    for size in (1, 2, 4):
        value = torch.nn.Parameter(torch.tensor(2.0))
        processes = SimpleNamespace(size=size)
        penalties = [value**2, value.detach() * 3]
        resident = SimpleNamespace(penalties=lambda given=penalties: given)
        training: Any = SimpleNamespace(task=SimpleNamespace(resident=resident, processes=processes))
        trainer._Training._add_penalty(training)
        assert value.grad is not None
        assert float(value.grad) == 4 / size
