"""The training loop: its steps against torch's own optimizer, and that nothing changes what comes of it."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from app.domain.attempt_lines import AttemptLine
from app.domain.request.finetuning import Finetune
from app.domain.request.sources import BuiltinText
from bitwright.errors import NumericalFailure
from bitwright.events import CheckpointEvent, MetricEvent, ProgressEvent, Stage
from tests.engine.finetune.small_lora import SmallLoRA, attach_small
from tests.engine.finetune.test_resident_model import results_of
from tests.engine.model.random_models import LENGTH, save_random_model
from tests.engine.text.test_examples import random_examples
from workers.contracts.adapters import TrainableAdapter
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.finetune import trainer
from workers.engine.finetune.checkpoints import TrainingState
from workers.engine.finetune.resident_model import Residence, ResidentModel, resident
from workers.engine.finetune.trainer import TrainingOutcome, TrainingTask, rate_share, train
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.reporter import Reporter
from workers.engine.text.examples import Example
from workers.engine.text.packing import Order, PackedSequences

SEED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    save_random_model(found, "llama", dtype=torch.bfloat16)
    return found


def config_of(**fields: Any) -> Finetune:
    defaults: dict[str, Any] = {"steps": 12, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 4}
    return Finetune(dataset=BuiltinText(), sequence_length=LENGTH, **(defaults | fields))


def sequences(seed: int, count: int = 30) -> PackedSequences:
    return PackedSequences.pack(random_examples(count, LENGTH, seed=seed), LENGTH, together=True)


def one_token(count: int) -> list[Example]:
    """Examples that say the same token again and again."""
    return [Example(torch.full((16,), 7, dtype=torch.int32), torch.ones(16, dtype=torch.bool)) for _ in range(count)]


class DroppingLoRA(SmallLoRA):
    """With random numbers in every step, as some adapters have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def attach_plain(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
    return attach_small(linears)


@dataclass(frozen=True)
class Trained:
    """Result of a run."""

    outcome: TrainingOutcome
    adapters: dict[str, dict[str, Tensor]]
    lines: list[AttemptLine]

    def told(self, kind: type) -> list[Any]:
        return [line for line in self.lines if isinstance(line, kind)]


@contextmanager
def open_job(folder: Path, attach: Any, recomputed: int = 0) -> Any:
    model = StreamedModel.open(Checkpoint.open(folder), torch.device("cpu"))
    how = Residence(length=LENGTH, keeps=True, recomputed=recomputed)
    with resident(model, partial(results_of, model), attach, how, seed=0) as found:
        yield found


def run(
    folder: Path,
    state: Path,
    *,
    attach: Any = attach_plain,
    micro_batch: int = 4,
    recomputed: int = 0,
    held_out: bool = True,
    processes: ProcessGroup = SINGLE_PROCESS,
    texts: tuple[PackedSequences, PackedSequences] | None = None,
    is_told: Callable[[int], bool] = lambda _: True,
    **fields: Any,
) -> Trained:
    lines: list[AttemptLine] = []
    training, validation = texts or (sequences(1), sequences(2, 8))
    with open_job(folder, attach, recomputed) as model:
        task = TrainingTask(
            resident=model,
            config=config_of(**fields),
            training=training,
            held_out=validation if held_out else None,
            micro_batch=micro_batch,
            seed=SEED,
            state=TrainingState(state, "fingerprint", processes),
            reporter=Reporter(lines.append),
            processes=processes,
            milestones=4,
            is_told=is_told,
        )
        outcome = train(task)
        adapters = {
            name: {key: value.clone() for key, value in a.state_dict().items()} for name, a in model.adapters.items()
        }
    return Trained(outcome, adapters, lines)


def assert_same(one: Trained, other: Trained) -> None:
    assert one.adapters.keys() == other.adapters.keys()
    for name, tensors in one.adapters.items():
        assert all(torch.equal(tensor, other.adapters[name][key]) for key, tensor in tensors.items())
    assert torch.equal(one.outcome.losses, other.outcome.losses)
    assert one.outcome.progress.validations == other.outcome.progress.validations


# ---- Steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_rise_and_fall_as_documented(schedule: str) -> None:
    config = config_of(steps=100, warmup_share=0.1, schedule=schedule)
    found = [rate_share(config, index) for index in range(100)]
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    after = [i / 90 for i in range(90)]
    expected = {
        "constant": [1.0] * 90,
        "linear": [1 - u for u in after],
        "cosine": [math.cos(math.pi * u / 2) ** 2 for u in after],
    }
    assert found[10:] == pytest.approx(expected[schedule])
    assert rate_share(config_of(steps=1, warmup_share=0.03), 0) == 1.0


def attach_double(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
    return attach_small(linears, torch.float64)


def test_steps_are_those_of_torchs_adamw_with_clipping(tmp_path: Path) -> None:
    """The oracle: torch's plain AdamW in fp64, parameter by parameter, on the mean loss of whole batches."""
    folder = tmp_path / "model"
    save_random_model(folder, "llama", dtype=torch.float64)
    fields: dict[str, Any] = {"weight_decay": 0.1, "clip_norm": 0.02, "warmup_share": 0.25, "schedule": "cosine"}
    found = run(folder, tmp_path, attach=attach_double, micro_batch=3, **fields)
    config = config_of(**fields)
    with open_job(folder, attach_double) as model:
        parameters = [p for adapter in model.adapters.values() for p in adapter.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-8)
        order, losses, norms = Order(sequences(1), 4, 4, SEED), [], []
        for index in range(12):
            (batch,) = order.step(index).batches
            optimizer.zero_grad()
            loss = model.loss(batch) / len(batch.target_positions)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, 0.02)))
            optimizer.param_groups[0]["lr"] = 0.01 * rate_share(config, index)
            optimizer.step()
            losses.append(loss.detach())
        assert min(norms) > 0.02, "clipped each time"
        expected = {name: adapter.state_dict() for name, adapter in model.adapters.items()}
    torch.testing.assert_close(found.outcome.losses, torch.stack(losses).float(), rtol=1e-6, atol=0)
    for name, tensors in found.adapters.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name][key], rtol=1e-8, atol=1e-10)


def test_training_learns_and_says_so(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, steps=40, validation_every=10, clip_norm=None, checkpoint_every=16)
    losses, progress = found.outcome.losses, found.outcome.progress
    assert losses.shape == (40,)
    assert losses[-8:].mean() < 0.9 * losses[:8].mean()
    assert [j.step for j in progress.validations] == [0, 10, 20, 30, 40]
    assert progress.tokens == sum(int(Order(sequences(1), 4, 4, SEED).step(i).tokens) for i in range(40))
    assert found.outcome.parameters == sum(t.numel() for a in found.adapters.values() for t in a.values())
    told = [line for line in found.told(MetricEvent) if line.name == "validation_loss"]
    assert [(line.step, line.value) for line in told] == [(j.step, j.loss) for j in progress.validations]
    assert {line.name for line in found.told(MetricEvent)} >= {"loss", "tokens_per_second"}
    assert [line.step for line in found.told(CheckpointEvent)] == [16, 32, 40]
    assert [line.milestone for line in found.told(CheckpointEvent)] == [4, 5, 7]
    steps = [line for line in found.told(ProgressEvent) if line.stage is Stage.FINETUNE]
    assert (steps[0].done, steps[-1].done, steps[-1].total) == (0, 40, 40)


class PulledLoRA(SmallLoRA):
    """`a` has a rate of nearly 0; the penalty pulls `b` to 1."""

    rates = MappingProxyType({"a": 1e-30})

    @classmethod
    def penalty(cls, adapters: Sequence[Self]) -> Tensor:
        return torch.stack([1e6 * (adapter.b - 1).square().sum() for adapter in adapters]).sum()


class SettlingLoRA(SmallLoRA):
    """After half of the steps `a` is held."""

    def progress(self, share: float) -> None:
        self.a.requires_grad_(share < 0.5)


def as_class(kind: type[SmallLoRA]) -> Any:
    def attach(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
        found = attach_small(linears)
        for module in found.values():
            module.__class__ = kind
        return found

    return attach


def test_what_a_rate_and_a_penalty_of_its_own_do(folder: Path, tmp_path: Path) -> None:
    with open_job(folder, attach_plain) as model:
        before = {name: adapter.state_dict() for name, adapter in model.adapters.items()}
    found = run(folder, tmp_path, attach=as_class(PulledLoRA), steps=3, warmup_share=0.0, weight_decay=0.5)
    for name, tensors in found.adapters.items():
        torch.testing.assert_close(tensors["a"], before[name]["a"], rtol=0, atol=1e-7)
        assert tensors["b"].min() > 0.02


def test_parameters_that_settle_move_no_more(folder: Path, tmp_path: Path) -> None:
    """They are what they were then, also after an interruption."""
    half = run(folder, tmp_path / "half", steps=6)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 10)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "cut", attach=as_class(SettlingLoRA))
    resumed, whole = (run(folder, tmp_path / name, attach=as_class(SettlingLoRA)) for name in ("cut", "whole"))
    assert_same(resumed, whole)
    for name, tensors in whole.adapters.items():
        assert torch.equal(tensors["a"], half.adapters[name]["a"])
        assert not torch.equal(tensors["b"], half.adapters[name]["b"])


# ---- What must change nothing ----------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at(patch: pytest.MonkeyPatch, steps: int) -> None:
    taken = []
    original = trainer._Training._step

    def step(self: Any, index: int, work: Any) -> None:
        taken.append(index)
        if len(taken) > steps:
            raise Interrupted
        original(self, index, work)

    patch.setattr(trainer._Training, "_step", step)


FIELDS: dict[str, Any] = {"validation_every": 3, "patience": 2, "learning_rate": 0.02, "schedule": "linear"}


@pytest.mark.parametrize("steps", [1, 4, 6, 11])
def test_an_interrupted_run_ends_with_the_same_bits(steps: int, folder: Path, tmp_path: Path) -> None:
    """Random numbers in each step, validations and the best of them included."""
    whole = run(folder, tmp_path / "whole", attach=as_class(DroppingLoRA), **FIELDS)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, steps)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "cut", attach=as_class(DroppingLoRA), **FIELDS)
    untold: Any = {"is_told": lambda milestone: milestone < 4 + steps // 4 - 1}  # the last: its attempt died with it
    resumed = run(folder, tmp_path / "cut", attach=as_class(DroppingLoRA), **untold, **FIELDS)
    assert resumed.outcome.resumed == steps // 4 * 4
    told = [line for line in whole.told(CheckpointEvent) if line.step >= max(steps // 4 * 4, 1)]
    assert resumed.told(CheckpointEvent) == told
    assert_same(whole, resumed)
    again = run(folder, tmp_path / "cut", attach=as_class(DroppingLoRA), **FIELDS)
    assert_same(whole, again)
    assert again.outcome.resumed == whole.outcome.progress.step
    assert not again.told(MetricEvent)
    assert not again.told(CheckpointEvent)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole", steps=30, checkpoint_every=2)
    for kill in range(10):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, 2 + kill % 2)
            with pytest.raises(Interrupted):
                run(folder, tmp_path / "cut", steps=30, checkpoint_every=2)
    resumed = run(folder, tmp_path / "cut", steps=30, checkpoint_every=2)
    assert resumed.outcome.resumed == 20
    assert_same(whole, resumed)


def other_seed(state: Path) -> str:
    return "another fingerprint"


def damaged(state: Path) -> str:
    (file,) = state.glob("training-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "fingerprint"


def missing(state: Path) -> str:
    (file,) = state.glob("training-*.safetensors")
    file.unlink()
    return "fingerprint"


def torn(state: Path) -> str:
    data = (state / "training.json").read_bytes()
    (state / "training.json").write_bytes(data[:-9])
    return "fingerprint"


def sound(state: Path) -> str:
    return "fingerprint"


@pytest.mark.parametrize(("change", "adopted"), [(sound, 12), (other_seed, 0), (damaged, 0), (missing, 0), (torn, 0)])
def test_only_a_sound_checkpoint_of_the_same_training_is_adopted(
    change: Callable[[Path], str], adopted: int, folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path / "run", held_out=False)
    state = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    assert {file.name for file in state.iterdir()} == {"training.json", "training-0000012.safetensors"}
    assert json.loads((state / "training.json").read_text())["progress"]["done"] is True
    assert TrainingState(state, change(state)).progress.step == adopted


def test_micro_batches_and_recomputed_blocks_change_little_or_nothing(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "a", attach=as_class(DroppingLoRA))
    again = run(folder, tmp_path / "b", attach=as_class(DroppingLoRA), recomputed=4)
    assert_same(whole, again)
    parts = run(folder, tmp_path / "c", micro_batch=1)
    torch.testing.assert_close(parts.outcome.losses, run(folder, tmp_path / "d").outcome.losses, rtol=2e-3, atol=0)


# ---- When to stop ----------------------------------------------------------------------------------------------------


def test_training_stops_when_held_out_text_gets_worse_and_keeps_the_best(folder: Path, tmp_path: Path) -> None:
    # One token is learned, and half of the validation is that token: its loss falls until the other half costs more.
    mixed = PackedSequences.pack([*one_token(4), *random_examples(4, LENGTH, seed=2)], LENGTH, together=True)
    texts = (PackedSequences.pack(one_token(30), LENGTH, together=True), mixed)
    fields: dict[str, Any] = {"steps": 300, "validation_every": 2, "patience": 3, "learning_rate": 0.01}
    found = run(folder, tmp_path, texts=texts, **fields)
    progress = found.outcome.progress
    assert progress.best_step is not None
    assert progress.best_step > 0
    assert progress.step < 300
    assert progress.stale == 3
    best = min(progress.validations, key=lambda validation: validation.loss)
    assert best.step == progress.best_step == progress.validations[-4].step
    with open_job(folder, attach_plain) as model:
        for name, adapter in model.adapters.items():
            adapter.load_state_dict(found.adapters[name])
        assert loss_on(model, mixed) == pytest.approx(best.loss, rel=1e-6)


@torch.no_grad()
def loss_on(model: ResidentModel, text: PackedSequences) -> float:
    (batch,) = Order(text, len(text), len(text), 0).step(0).batches
    return float(model.loss(batch)) / len(batch.target_positions)


def test_a_loss_that_is_not_finite_ends_the_job(folder: Path, tmp_path: Path) -> None:
    def attach(linears: Any, seed: int) -> dict[str, TrainableAdapter]:
        found = attach_small(linears)
        next(iter(found.values())).b.data.fill_(math.nan)  # type: ignore[operator]
        return found

    with pytest.raises(NumericalFailure, match="held-out text the loss is nan after 0 steps"):
        run(folder, tmp_path / "a", attach=attach)
    with pytest.raises(NumericalFailure, match="training loss is not finite") as caught:
        run(folder, tmp_path / "b", attach=attach, held_out=False)
    assert caught.value.field == "finetune.learning_rate"
