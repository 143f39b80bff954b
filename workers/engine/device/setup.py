"""The device of a job: opening it, and reproducible arithmetic on it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workers.disk.orders import AttemptOrder
from workers.machine import available_threads


def open_device(order: AttemptOrder, rank: int = 0) -> torch.device:
    """The device of a rank of the order, and as many threads as the process may use of what all ranks may."""
    torch.set_num_threads(max(1, available_threads() // order.world_size))
    if order.device == "cpu":
        return torch.device("cpu")
    # ProcessGroup that outnumber the GPUs share them: nothing that a worker asks for, but a way to test with one.
    device = torch.device("cuda", (order.device_index + rank) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a GPU while the context lasts; on a CPU they are deterministic anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
