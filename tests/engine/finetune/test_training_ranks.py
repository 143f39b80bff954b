"""Two ranks, which are real processes, train what one trains: each reads its share, gradients are summed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bitwright.errors import InternalError
from tests.engine.device.rank_pair import SIZE, RankPair
from tests.engine.finetune.small_lora import SmallLoRA
from tests.engine.finetune.test_trainer import Trained, as_class, attach_double, run
from tests.engine.model.random_models import save_random_model
from workers.engine.device.process_group import ProcessGroup, joined
from workers.engine.finetune.checkpoints import TrainingState

FIELDS: dict[str, Any] = {"steps": 6, "batch_size": 5, "validation_every": 3, "checkpoint_every": 2, "micro_batch": 2}


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPair]:
    with RankPair() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    save_random_model(found, "llama", dtype=torch.float64)
    return found


def trained(rank: int, store: Path, folder: Path, state: Path, differing: bool) -> Trained:
    def attach(linears: Any, seed: int) -> Any:
        return attach_double(linears if not differing or rank == 0 else dict(list(linears.items())[::-1]), seed)

    with joined(ProcessGroup(rank, SIZE), str(store), torch.device("cpu")) as processes:
        return run(folder, state, attach=attach, processes=processes, **FIELDS)


def test_two_ranks_train_as_one_does(pair: RankPair, folder: Path, tmp_path: Path) -> None:
    """Five sequences per step: three for the first rank, two for the second."""
    first, second = pair.run(trained, tmp_path / "store", folder, tmp_path / "state", False)
    one = run(folder, tmp_path / "one", attach=attach_double, **FIELDS)
    for name, tensors in one.adapters.items():
        for key, tensor in tensors.items():
            assert torch.equal(first.adapters[name][key], second.adapters[name][key])
            torch.testing.assert_close(first.adapters[name][key], tensor, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(first.outcome.losses, one.outcome.losses, rtol=1e-6, atol=0)
    validations = [[j.loss for j in found.outcome.progress.validations] for found in (first, second, one)]
    assert validations[0] == validations[1] == pytest.approx(validations[2], rel=1e-9)
    assert first.outcome.progress.tokens == one.outcome.progress.tokens
    assert TrainingState(tmp_path / "state", "fingerprint").progress.step == 6
    again = pair.run(trained, tmp_path / "store2", folder, tmp_path / "state", False)
    assert [found.outcome.resumed for found in again] == [6, 6]


class DrawingLoRA(SmallLoRA):
    """Draws a number in each training pass, and keeps it."""

    draws: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.draws.append(float(torch.rand(())))
        return super().forward(x)


def drawn(rank: int, store: Path, folder: Path, state: Path) -> list[float]:
    DrawingLoRA.draws.clear()
    with joined(ProcessGroup(rank, SIZE), str(store), torch.device("cpu")) as processes:
        fields: dict[str, Any] = FIELDS | {"steps": 2, "batch_size": 4}
        run(folder, state, attach=as_class(DrawingLoRA), processes=processes, held_out=False, **fields)
    return list(DrawingLoRA.draws)


def test_each_rank_and_step_has_its_own_noise(pair: RankPair, folder: Path, tmp_path: Path) -> None:
    """Else half of a step's sequences lose what the other half loses."""
    first, second = pair.run(drawn, tmp_path / "store", folder, tmp_path / "state")
    assert len(first) == len(second) == 2 * 4 * 7
    assert len({*first, *second}) > 0.98 * len([*first, *second])


def test_ranks_that_start_differently_are_refused(pair: RankPair, folder: Path, tmp_path: Path) -> None:
    found = pair.run(trained, tmp_path / "store", folder, tmp_path / "state", True)
    assert [type(answer) for answer in found] == [InternalError, InternalError]
