"""Preparation of an attempt that has no job yet: what every job takes seconds to import, and its device's context.

Nothing here draws a random number or keeps a tensor, so that a job's numbers do not depend on how its process began.
"""

import os
from collections.abc import Callable
from contextlib import suppress

from app.many_imports import many_imports
from workers.child.gpu_stacks import give_stacks_back, loaded_driver

NOT_NEEDED = ("scipy",)
"""Packages that transformers imports where they are installed, for models that find objects in pictures."""


def prepare(device: str) -> Callable[[], None]:
    """Import the engine with its libraries and open a device, "cpu" or "cuda"; a second call costs nothing.

    What is returned is to be called when there is a job, in the same thread: it takes what a process that waits has
    given back.
    """
    wait_quietly()
    with many_imports(NOT_NEEDED):
        _import_all()
    if device == "cuda":
        _open_gpu()
        return give_stacks_back(loaded_driver())
    _read_loops()
    return lambda: None


def _import_all() -> None:
    # transformers loads a type's code when it is asked for it: this is the part that types share.
    from transformers.models.llama import modeling_llama  # noqa: PLC0415, F401

    from app.domain.format_rules import default_for, stored_formats  # noqa: PLC0415
    from app.domain.formats import Result  # noqa: PLC0415
    from app.report_page.page import template  # noqa: PLC0415
    from workers.engine import reporter, run  # noqa: PLC0415, F401
    from workers.formats.library_config import know  # noqa: PLC0415
    from workers.formats.registry import format_of  # noqa: PLC0415

    know("llama")
    for name in stored_formats([default_for(Result.AFFINE)]):
        format_of(name)
    template()


def wait_quietly() -> None:
    """Let threads that wait for each other sleep rather than spin: on a shared machine spinning costs many times the
    work. OpenMP reads this when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _read_loops() -> None:
    """Loops that are compiled already; others are left to the job that needs them, and to the worker's own child."""
    from workers.numerics.loops.compiled import are_kept  # noqa: PLC0415

    if are_kept():
        from workers.numerics.backends.loops_ahead import compile_all  # noqa: PLC0415

        compile_all()


def _open_gpu() -> None:
    """The context of the first visible GPU, its matrix library for what most models are in, and Triton's driver.

    No other dtype: each that is multiplied in takes its kernels into the device's memory, while the process waits.
    """
    import torch  # noqa: PLC0415

    from workers.engine.device.setup import reproducible  # noqa: PLC0415
    from workers.numerics.backend import triton_serves  # noqa: PLC0415

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with reproducible(device):
        ones = torch.ones(32, 32, dtype=torch.bfloat16, device=device)
        (ones @ ones).sum().item()
        del ones
    if triton_serves(device, torch.bfloat16):
        with suppress(Exception):  # what fails here fails again, and is reported, where a kernel is needed
            from triton.runtime import driver  # noqa: PLC0415

            driver.active.get_current_target()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
