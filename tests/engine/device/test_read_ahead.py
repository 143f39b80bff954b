"""Reading one block ahead: in order, never two ahead, errors in their place, nothing kept."""

import gc
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch

from bitwright.errors import NumericalFailure
from tests.engine.model.random_models import save_random_model
from workers.engine.device.read_ahead import Upload, read_ahead
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.block_reader import BlockReader

CPU = torch.device("cpu")


class Item:
    """Something that a weak reference can point to."""


def wait_until(seen: list[int], count: int) -> None:
    deadline = time.monotonic() + 5
    while len(seen) < count:
        assert time.monotonic() < deadline, seen
        time.sleep(0.001)


def test_the_next_item_is_read_while_one_is_used_and_no_other() -> None:
    read: list[int] = []

    def note(index: int) -> int:
        read.append(index)
        return index

    with closing(read_ahead(note, 5, CPU)) as items:
        for index in range(5):
            assert next(items) == index
            wait_until(read, min(index + 2, 5))
            time.sleep(0.01)
            assert read == list(range(min(index + 2, 5)))
        assert next(items, None) is None


def test_an_item_is_given_while_the_next_is_being_read() -> None:
    given = threading.Event()

    def read(index: int) -> int:
        assert index == 0 or given.wait(5), "the item before was held back"
        return index

    with closing(read_ahead(read, 2, CPU)) as items:
        assert next(items) == 0
        given.set()
        assert next(items) == 1


def test_items_are_read_in_one_thread_which_ends_with_them() -> None:
    threads = set()
    items = read_ahead(lambda _: threads.add(threading.current_thread()), 4, CPU)
    next(items)
    items.close()
    (thread,) = threads
    assert thread is not threading.main_thread()
    assert not thread.is_alive()
    assert list(read_ahead(lambda index: index, 0, CPU)) == []


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    failure = NumericalFailure("block 1 is not finite")

    def read(index: int) -> int:
        if index == 1:
            raise failure
        return index

    with closing(read_ahead(read, 3, CPU)) as items:
        assert next(items) == 0
        time.sleep(0.02)  # it has failed by now
        with pytest.raises(NumericalFailure) as caught:
            next(items)
    assert caught.value is failure


def test_without_room_for_two_an_item_is_read_when_its_turn_comes() -> None:
    held: list[int] = []

    def read(index: int) -> int:
        if held:
            raise torch.OutOfMemoryError("no room for two")
        return index

    with closing(read_ahead(read, 3, CPU)) as items:
        for index in range(3):
            assert next(items) == index
            held.append(index)
            time.sleep(0.01)  # the next one has failed by now
            held.clear()


def test_nothing_is_kept_of_an_item() -> None:
    with closing(read_ahead(lambda _: Item(), 3, CPU)) as items:
        for _ in range(3):
            gone = weakref.ref(next(items))
            gc.collect()
            assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_upload_is_the_tensor_in_another_dtype(dtype: torch.dtype) -> None:
    upload = Upload(CPU, chunk_bytes=64)
    for shape in ((3, 37), (16,), (1,), (0, 4), ()):
        tensor = torch.randn(shape)
        assert torch.equal(upload(tensor, dtype), tensor.to(dtype))
    transposed = torch.randn(5, 7).T
    assert torch.equal(upload(transposed, dtype), transposed.to(dtype))


def test_blocks_come_whole_and_only_unfinished_ones_without_quantized_weights(tmp_path: Path) -> None:
    save_random_model(tmp_path / "model", "qwen2")
    model = StreamedModel.open(Checkpoint.open(tmp_path / "model"), CPU)
    state = FinishedBlocks(tmp_path / "state")
    state.adopt("fingerprint")
    for index in range(2):
        state.save(index, {}, None)
    state = FinishedBlocks(tmp_path / "state")
    state.adopt("fingerprint")
    assert state.resumed == 2
    for index, block in enumerate(BlockReader(model, state).blocks()):
        assert block.quantized == {}
        with model.loaded(model.layout.block(index)):
            expected = dict(model.blocks[index].named_parameters(prefix=model.layout.block(index)))
        given = dict(block.original)
        with model.filled(block.original):
            found = dict(model.blocks[index].named_parameters(prefix=model.layout.block(index)))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], given[name]) for name in found)
        assert block.original == {}
        assert all(p.device.type == "meta" for p in model.blocks[index].parameters())
