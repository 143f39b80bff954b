"""State on disk, written so that a crash at any time loses at most the last piece: blocks, scales, and training's."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.domain.methods import Scheme
from bitwright.report import ScaleReport
from tests.formats.examples import random_result
from workers.engine import finished_blocks
from workers.engine.finetune import checkpoints
from workers.engine.finetune.checkpoints import TrainingProgress, TrainingState
from workers.engine.finished_blocks import FinishedBlocks
from workers.numerics.quantized import LinearResult

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)
TUNED = ScaleReport(
    steps=3,
    kl_initial=0.2,
    kl=0.1,
    kept=True,
    held_out=1,
    micro_batch=1,
    blocks_recomputed=0,
    captured=False,
    seconds=1.0,
)


def block(index: int) -> dict[str, LinearResult]:
    return {f"layers.{index}.up": random_result((8, 32), SCHEME, torch.float32, seed=index)}


class Assistant(SimpleNamespace):
    """A process that is not the first; all agree with it."""

    leads = False

    def agree(self, _: int) -> bool:
        return True

    def least(self, number: int) -> int:
        return number


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """Every file that is written, in order, and what lay beside it just before."""
    found: list[tuple[str, set[str]]] = []
    for module in (checkpoints, finished_blocks):
        write: Callable[[Path, bytes], None] = vars(module)["replace_file"]

        def watched(path: Path, data: bytes, write: Any = write) -> None:
            found.append((path.name, names(path.parent)))
            write(path, data)

        monkeypatch.setattr(module, "replace_file", watched)
    return found


def test_a_block_is_durable_before_the_state_names_it(tmp_path: Path, written: list[tuple[str, set[str]]]) -> None:
    state = FinishedBlocks(tmp_path)
    state.adopt("one")
    for index in range(2):
        state.save(index, block(index), None)
    assert [name for name, _ in written] == [
        *("block-00000.safetensors", "state.json", "block-00001.safetensors", "state.json")
    ]
    told = json.loads((tmp_path / "state.json").read_text())
    for each in told["blocks"]:
        assert each["sha256"] == hashlib.sha256((tmp_path / each["file"]).read_bytes()).hexdigest()


def test_a_shard_counts_only_once_it_is_finished(tmp_path: Path) -> None:
    state = FinishedBlocks(tmp_path)
    state.adopt("one")
    state.save(0, block(0), None)
    state.write_shard(1, block(1))
    again = FinishedBlocks(tmp_path)
    again.adopt("one")
    assert (again.resumed, len(again.blocks)) == (1, 1)


def finished(folder: Path, count: int = 3) -> FinishedBlocks:
    state = FinishedBlocks(folder)
    state.adopt("one")
    for index in range(count):
        state.save(index, block(index), None)
    return state


@pytest.mark.parametrize(("damaged", "adopted"), [(0, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_blocks_are_adopted_up_to_the_first_that_is_not_as_it_was(
    damaged: int, adopted: int, how: str, tmp_path: Path
) -> None:
    finished(tmp_path)
    file = tmp_path / f"block-{damaged:05d}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x") if how == "changed" else file.unlink()
    again = FinishedBlocks(tmp_path)
    again.adopt("one")
    assert len(again.blocks) == again.resumed == adopted


def test_blocks_of_another_fingerprint_and_out_of_order_are_not_adopted(tmp_path: Path) -> None:
    finished(tmp_path)
    other = FinishedBlocks(tmp_path)
    other.adopt("two")
    assert (other.resumed, other.fingerprint) == (0, "two")
    told = json.loads((tmp_path / "state.json").read_text())
    del told["blocks"][1]
    (tmp_path / "state.json").write_text(json.dumps(told))
    other.adopt("one")
    assert other.resumed == 1


def test_parameters_tuned_along_take_the_place_of_the_blocks_own(tmp_path: Path) -> None:
    state, old, new = FinishedBlocks(tmp_path), torch.ones(4), torch.full((4,), 0.5)
    state.adopt("one")
    for index in range(2):
        norms = {f"layers.{index}.{name}.weight": old.clone() for name in ("norm", "other")}
        state.finish(index, state.write_shard(index, block(index), norms), None)
    state.save_scales({}, TUNED, {1: {"layers.1.norm.weight": new}})
    again = FinishedBlocks(tmp_path)
    again.adopt("one")
    for held in (state, again):
        assert all(torch.equal(value, old) for value in held.parameters(0).values())
        found = held.parameters(1)
        assert torch.equal(found.pop("layers.1.norm.weight"), new)
        assert [(name, torch.equal(value, old)) for name, value in found.items()] == [("layers.1.other.weight", True)]


def test_tuned_scales_take_the_place_of_the_blocks_own_and_belong_to_all_of_them(
    tmp_path: Path, written: list[tuple[str, set[str]]]
) -> None:
    state, tuned = finished(tmp_path), torch.full((8, 2), 0.25)
    written.clear()
    state.save_scales({"layers.1.up": tuned}, TUNED)
    assert [name for name, _ in written] == ["scales.safetensors", "state.json"]
    again = FinishedBlocks(tmp_path)
    again.adopt("one")
    assert again.scales == TUNED
    for held in (state, again):
        for index in range(3):
            weight = held.load(index)[f"layers.{index}.up"].affine
            assert torch.equal(weight.scale, tuned) is (index == 1)
            assert torch.equal(weight.codes, block(index)[f"layers.{index}.up"].affine.codes)
    (tmp_path / "block-00002.safetensors").unlink()
    rest = FinishedBlocks(tmp_path)
    rest.adopt("one")
    assert rest.resumed == 2
    assert rest.scales is None
    assert not torch.equal(rest.load(1)["layers.1.up"].affine.scale, tuned)


def test_tuned_codes_take_the_place_of_the_blocks_own_once_the_state_says_so(
    tmp_path: Path, written: list[tuple[str, set[str]]]
) -> None:
    state, codes = finished(tmp_path), torch.full((8, 32), 5, dtype=torch.uint8)
    before, scale = state.load(1)["layers.1.up"].affine, torch.full((8, 2), 0.25)
    written.clear()
    state.save_scales({"layers.1.up": scale}, TUNED, codes={"layers.1.up": codes})
    assert [name for name, _ in written] == ["tuned-00001.safetensors", "scales.safetensors", "state.json"]
    again = FinishedBlocks(tmp_path)
    again.adopt("one")
    for held in (state, again):
        weight = held.load(1)["layers.1.up"].affine
        assert torch.equal(weight.codes, codes)
        assert torch.equal(weight.scale, scale)
        assert torch.equal(held.load(0)["layers.0.up"].affine.codes, block(0)["layers.0.up"].affine.codes)
    file = tmp_path / "tuned-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    rest = FinishedBlocks(tmp_path)
    rest.adopt("one")
    assert (rest.resumed, rest.scales) == (3, None)
    assert torch.equal(rest.load(1)["layers.1.up"].affine.codes, before.codes)
    assert torch.equal(rest.load(1)["layers.1.up"].affine.scale, before.scale)


def test_only_the_first_process_writes_blocks(tmp_path: Path, written: list[tuple[str, set[str]]]) -> None:
    processes: Any = Assistant()
    state = FinishedBlocks(tmp_path, processes)
    state.adopt("one")
    state.save(0, block(0), None)
    assert written == []
    assert len(state.blocks) == 1, "it is there once the first has written it"


# ---- Training --------------------------------------------------------------------------------------------------------


def progress(step: int, *, done: bool = False) -> TrainingProgress:
    return TrainingProgress(step=step, done=done)


def test_a_checkpoint_is_durable_before_it_is_named_and_the_one_before_it_goes_last(
    tmp_path: Path, written: list[tuple[str, set[str]]]
) -> None:
    state = TrainingState(tmp_path, "one")
    for step in (2, 4):
        state.save(progress(step), {"value": torch.full((2,), float(step))})
        assert names(tmp_path) == {"training.json", f"training-{step:07d}.safetensors"}
    assert written == [
        ("training-0000002.safetensors", set()),
        ("training.json", {"training-0000002.safetensors"}),
        ("training-0000004.safetensors", {"training.json", "training-0000002.safetensors"}),
        ("training.json", {"training.json", "training-0000002.safetensors", "training-0000004.safetensors"}),
    ]
    again = TrainingState(tmp_path, "one")
    assert again.progress.step == 4
    assert again.tensors()["value"].tolist() == [4.0, 4.0]
    assert TrainingState(tmp_path, "two").progress == TrainingProgress()
    assert TrainingState(tmp_path, "two").tensors() == {}


def test_a_checkpoint_of_the_same_step_never_overwrites_the_one_that_is_named(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, "one")
    for done, file in ((False, "training-0000002.safetensors"), (True, "training-0000002-done.safetensors")):
        state.save(progress(2, done=done), {"value": torch.zeros(2)})
        assert names(tmp_path) == {"training.json", file}
    assert TrainingState(tmp_path, "one").progress.done


def test_only_the_first_process_writes_checkpoints(tmp_path: Path) -> None:
    processes: Any = Assistant()
    TrainingState(tmp_path, "one", processes).save(progress(2), {"value": torch.zeros(2)})
    assert names(tmp_path) == set()
