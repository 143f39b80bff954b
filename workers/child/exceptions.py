"""Any exception of a child process as an error with a code."""

import errno
import sys

from app.domain.full_disk import disk_full
from bitwright.errors import BitwrightError, CudaError, DiskFull, InternalError, OutOfGpuMemory, OutOfMemory, OverLimit

GPU_EXHAUSTED = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""torch's allocator; what allocates past it (pinned memory, graphs); cuBLAS for its workspace."""


def as_bitwright_error(error: BaseException) -> BitwrightError:
    """The error to report. torch's kinds are known by name, so that nothing is imported for it."""
    if isinstance(error, BitwrightError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    first = text.splitlines()[0] if text else type(error).__name__
    hint = "fewer calibration sequences, shorter sequences or a smaller batch_size need less"
    if "OutOfMemoryError" in kinds or any(words in text for words in GPU_EXHAUSTED):
        return OutOfGpuMemory(f"the GPU's memory was exhausted{_peak()}: {first}", hint=hint)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or _no_memory(error):
        return OutOfMemory("the machine's memory was exhausted", hint=hint)
    if "AcceleratorError" in kinds or "CUDA error" in text or "CUBLAS_STATUS" in text:
        return CudaError(f"the GPU reported a fault: {first}")
    if disk_full(error) or "No space left on device" in text:  # safetensors' own
        return DiskFull("the worker's disk is full", hint="free space under the workspace folder, and retry")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        hint = "ask for fewer formats; a file of a result is never so large"
        return OverLimit("a file grew beyond what the attempt may write", hint=hint)
    return InternalError(f"{type(error).__name__}; the attempt's log has more")


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def _peak() -> str:
    torch = sys.modules.get("torch")
    return "" if torch is None else f" (peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB)"
