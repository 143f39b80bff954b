"""Compilation of a job's kernels in several threads while texts are tokenized, instead of one by one in block 0.

A `KernelMethod` gives calls that compile its kernels; those of hand-fused blocks come on top.
Whatever fails here fails again, and is reported, where the kernel is really needed.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from app.domain.methods import Scheme, WeightSpec
from workers.contracts.blocks import KernelMethod, WarmUp
from workers.engine.model import fused_blocks, fused_parts
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.registry import method_of
from workers.numerics.backend import triton_serves

THREADS = 16
"""A compiler leaves its thread's interpreter alone, so that as many run as there are processors."""


@contextmanager
def compiling(
    model: StreamedModel, schemes: Mapping[str, Scheme], spec: WeightSpec, scale_dtype: torch.dtype
) -> Iterator[None]:
    """Kernels compile while the context lasts; it ends when they are done."""
    if not triton_serves(model.device, model.dtype):
        yield
        return
    with ThreadPoolExecutor(THREADS, initializer=torch.cuda.set_device, initargs=(model.device,)) as pool:
        for call in _calls(model, schemes, spec, scale_dtype):
            pool.submit(call)
        yield


def _calls(
    model: StreamedModel, schemes: Mapping[str, Scheme], spec: WeightSpec, scale_dtype: torch.dtype
) -> list[Callable[[], object]]:
    linears = model.linears()
    kinds = frozenset((linears[name].in_features, scheme) for name, scheme in schemes.items() if name in linears)
    method, first, calls = method_of(spec), model.blocks[0], list[Callable[[], object]]()
    if isinstance(method, KernelMethod):
        calls += method.warm_ups(WarmUp(kinds, model.dtype, scale_dtype, model.device), spec)
    if isinstance(first, fused_blocks.FusedBlock):
        calls += fused_blocks.warm_ups(first, model.dtype, model.device)
    else:
        calls += fused_parts.warm_ups(model.blocks, model.dtype, model.device)
    return calls
