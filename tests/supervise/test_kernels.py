"""Compiled loops: made once by a child of the worker, copied to attempts, the same numbers however they came."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervise.bench import alive, wait_for
from workers.supervise import kernels as module
from workers.supervise.child_env import kernels_in
from workers.supervise.kernels import Kernels

NUMBERS = """
import hashlib, torch
from workers.numerics.backends import block_loops
generator = torch.Generator().manual_seed(0)
x, update, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((2, 64, 576),) * 2 + ((576,),))
x.requires_grad_()
outputs = block_loops.add_rms_norm(x, update, weight, 1e-5)
torch.autograd.backward(outputs, [update, update])
loss, gradient = block_loops.square_error([output.detach() for output in outputs], update, torch.tensor([1, 0]), 1, 1)
told = (*outputs, x.grad, gradient, loss.view(1))
print(hashlib.sha256(b"".join(t.detach().view(torch.uint8).numpy().tobytes() for t in told)).hexdigest())
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    monkeypatch.setattr(module, "MODULE", "tests.supervise.kernel_child")
    made = Kernels(tmp_path / "kernels", 30.0)
    yield made
    made.close()


def filled(kernels: Kernels) -> bool:
    kernels.tend()
    return kernels.ready


def ended(kernels: Kernels) -> bool:
    kernels.tend()
    return kernels._child is None


def test_a_child_fills_the_folder_once_and_attempts_get_copies(kernels: Kernels, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    kernels.give(first)
    assert not first.exists(), "nothing to give yet"
    wait_for(lambda: filled(kernels), what="compiled loops")
    (folder,) = (tmp_path / "kernels").iterdir()
    assert [file.name for file in folder.iterdir()] == ["loop.nbc"]
    kernels.give(first)
    (kernels_in(first) / "loop.nbc").write_bytes(b"another's")
    (kernels_in(first) / "more.nbc").write_bytes(b"its own")
    kernels.give(second)
    assert [(file.name, file.read_bytes()) for file in kernels_in(second).iterdir()] == [("loop.nbc", b"code")]
    kernels.tend()
    assert kernels._child is None, "it is made once"
    again = Kernels(tmp_path / "kernels", 30.0)
    again.tend()
    assert again.ready
    assert again._child is None


def test_a_child_that_fails_costs_nothing_but_its_time(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_TEST_EXIT", "1")
    kernels.tend()
    wait_for(lambda: ended(kernels), what="the child's end")
    assert not kernels.ready
    assert list((tmp_path / "kernels").iterdir()) == []
    kernels.tend()
    assert kernels._child is None, "not again by this worker"
    kernels.give(tmp_path / "attempt")
    assert not (tmp_path / "attempt").exists()


def test_the_child_ends_with_its_worker(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODULE", "workers.child.kernels")
    kernels.tend()
    assert kernels._child is not None
    pid = kernels._child.pid
    kernels.close()
    assert not alive(pid)
    assert list((tmp_path / "kernels").iterdir()) == []
    kernels.tend()
    assert kernels._child is None


def test_versions_that_nobody_uses_are_forgotten(kernels: Kernels, tmp_path: Path) -> None:
    old, young = tmp_path / "kernels" / "old", tmp_path / "kernels" / "young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    long_ago = time.time() - module.UNUSED_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    kernels.tend()
    assert not old.exists()
    assert young.exists()


@pytest.mark.slow
def test_numbers_are_the_same_whether_loops_are_compiled_or_read(tmp_path: Path) -> None:
    def told(folder: str) -> str:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        done = subprocess.run([sys.executable, "-c", NUMBERS], env=environment, capture_output=True, check=True)
        return done.stdout.decode()

    compiled_and_kept, read, compiled = told(str(tmp_path)), told(str(tmp_path)), told("")
    assert compiled_and_kept == read == compiled
