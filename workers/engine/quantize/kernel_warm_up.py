"""A job's kernels, compiled at once in several threads while texts are tokenized, instead of one by one in block 0.

A method may offer calls that compile its kernels (`warm_ups(kinds, spec)`); those of hand-fused blocks come on top.
Whatever fails here fails again, and is reported, where the kernel is really needed.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch

from app.domain.methods import Scheme, WeightSpec
from workers.contracts.blocks import WarmUp
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.registry import method_of

THREADS = 16
"""A compiler leaves its thread's interpreter alone, so that as many run as there are processors."""


@contextmanager
def compiling(
    model: StreamedModel, schemes: Mapping[str, Scheme], spec: WeightSpec, scale_dtype: torch.dtype
) -> Iterator[None]:
    """Kernels compile while the context lasts; it ends when they are done."""
    if model.device.type != "cuda" or find_spec("triton") is None:
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
    kinds = frozenset((linears[name].in_features, scheme) for name, scheme in schemes.items())
    offer = getattr(method_of(spec), "warm_ups", None)
    calls = [] if offer is None else list(offer(WarmUp(kinds, model.dtype, scale_dtype, model.device), spec))
    fused_block, first = import_module("workers.engine.model.fused_blocks"), model.blocks[0]
    if isinstance(first, fused_block.FusedBlock):
        calls += fused_block.warm_ups(first, model.dtype, model.device)
    return calls
