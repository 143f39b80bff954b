"""The runtimes by name: each reads a checkpoint as its users do, and answers with logits and tokens."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from workers.runtimes.order import ReadAnswer, ReadOrder


def _transformers(order: ReadOrder) -> ReadAnswer:
    from workers.runtimes.in_transformers import read  # noqa: PLC0415 - a reader imports its runtime when it is asked

    return read(order)


def _llama_cpp(order: ReadOrder) -> ReadAnswer:
    from workers.runtimes.in_llama_cpp import read  # noqa: PLC0415

    return read(order)


READERS: Mapping[str, Callable[[ReadOrder], ReadAnswer]] = MappingProxyType(
    {"transformers": _transformers, "peft": _transformers, "llama.cpp": _llama_cpp}
)
"""Those that run inside the host; vLLM has another Python (`in_vllm.py`)."""
