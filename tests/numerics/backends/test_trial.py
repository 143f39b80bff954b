"""Triton is tested by use: where its kernels cannot run, the reason is told and torch's operators compute."""

import os
import subprocess
import sys

import pytest
import torch

from workers.numerics import backend
from workers.numerics.backends import trial


def test_it_runs_where_kernels_run() -> None:
    """On this machine in Triton's interpreter, or on its GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert trial.triton_fault(device) is None


def test_a_kernel_that_computes_something_else_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert str(trial.triton_fault(device)).startswith("WrongResult")


def test_the_reason_is_one_line_and_torch_computes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> None:
        raise RuntimeError("\nFailed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(trial, "_run", fail)
    assert trial.triton_fault(torch.device("cuda")) == "RuntimeError: Failed to find C compiler."
    backend._has_triton.cache_clear()
    try:
        assert not backend.triton_serves(torch.device("cuda"), torch.bfloat16)
        assert backend.block_kernels(torch.device("cuda"), torch.bfloat16) is None
    finally:
        backend._has_triton.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it works")
def test_a_machine_without_a_driver_is_told_from_one_that_works() -> None:
    """The trial is what a worker starts: real Triton, no interpreter, no GPU."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "workers.numerics.backends.trial"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout
    assert "\n" not in done.stdout
