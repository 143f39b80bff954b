"""Preparation of an attempt that has no job yet: what every job takes seconds to import, and its device's context.

Nothing here draws a random number or keeps a tensor, so that a job's numbers do not depend on how its process began.
"""

import os
from contextlib import suppress


def prepare(device: str) -> None:
    """Import the engine with its libraries and open a device, "cpu" or "cuda"; a second call costs nothing."""
    wait_quietly()
    # transformers loads a type's code when it is asked for it: this is the part that types share.
    from transformers.models.llama import modeling_llama  # noqa: PLC0415, F401

    from workers.engine import reporter, run  # noqa: PLC0415, F401
    from workers.formats.library_config import know  # noqa: PLC0415

    know("llama")

    if device == "cuda":
        _open_gpu()


def wait_quietly() -> None:
    """Let threads that wait for each other sleep rather than spin: on a shared machine spinning costs many times the
    work. OpenMP reads this when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _open_gpu() -> None:
    """The context of the first visible GPU, its matrix library for the dtypes of models, and Triton's driver."""
    import torch  # noqa: PLC0415

    from workers.engine.device.setup import reproducible  # noqa: PLC0415
    from workers.numerics.backend import triton_serves  # noqa: PLC0415

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with reproducible(device):
        for dtype in (torch.bfloat16, torch.float32):
            ones = torch.ones(32, 32, dtype=dtype, device=device)
            (ones @ ones).sum().item()
            del ones
    if triton_serves(device, torch.bfloat16):
        with suppress(Exception):  # what fails here fails again, and is reported, where a kernel is needed
            from triton.runtime import driver  # noqa: PLC0415

            driver.active.get_current_target()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
