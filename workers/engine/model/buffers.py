"""Buffers of a model that was built without memory: computed ones get their values, the others wait for the file's.

A persistent buffer (the bias of a router) is a part of the checkpoint like a parameter; others, such as rotary
frequencies, are computed from the configuration.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture

MOST_BUFFER_BYTES = 2 << 30


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Gives every buffer memory and the value that transformers' own initialization computes for it.

    Where that leaves one out, the module is built again with memory, as far as its own configuration is enough for it.

    Raises:
        UnsupportedArchitecture: a buffer is left that neither fills.
    """
    check_buffers(model)
    persistent = set(model.state_dict())
    empty = [
        (f"{name}.{leaf}", module, leaf)
        for name, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    for _, module, leaf in empty:
        module._buffers[leaf] = _unfilled(module._buffers[leaf])
    for module in {id(module): module for _, module, _ in empty}.values():
        _initialize(model, module)
    if any(_is_unfilled(module._buffers[leaf]) for _, module, leaf in empty):
        for module in model.modules():
            # Some models fill the buffers of their parts.
            if isinstance(module, PreTrainedModel):
                _initialize(model, module)
    for name, module, leaf in empty:
        buffer = module._buffers[leaf]
        if _is_unfilled(buffer):
            # What the checkpoint fills needs no value of its own.
            buffer = torch.zeros_like(buffer) if name in persistent else _built_again(model, module, leaf)
        if buffer is None:
            hint = "choose a model that transformers builds from its config.json alone"
            raise UnsupportedArchitecture(f"nothing computes the buffer {name}", field="model", hint=hint)
        module._buffers[leaf] = buffer.to(device)


def check_buffers(model: PreTrainedModel) -> None:
    """Check that buffers, which get memory before any weight is read, are no larger than models have them.

    Raises:
        CorruptCheckpoint: together they are.
    """
    sizes = {
        name: buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers() if buffer is not None
    }
    if sum(sizes.values()) > MOST_BUFFER_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        detail = (
            f"config.json makes buffers of {sum(sizes.values())} bytes ({largest} of {sizes[largest]}); at most "
            f"{MOST_BUFFER_BYTES} are given"
        )
        hint = "correct the numbers of config.json that count positions, heads or states"
        raise CorruptCheckpoint(detail, field="model", value=largest, hint=hint)


def _unfilled(buffer: Any) -> torch.Tensor:
    """Memory with a value that no initialization computes, so that a buffer that nothing fills is seen."""
    if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
        return torch.full_like(buffer, torch.nan, device="cpu")
    if buffer.dtype == torch.bool:
        return torch.zeros_like(buffer, device="cpu")
    return torch.full_like(buffer, torch.iinfo(buffer.dtype).min if buffer.dtype.is_signed else 0, device="cpu")


def _is_unfilled(buffer: Any) -> bool:
    if buffer is None or not buffer.numel():
        return False
    if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
        return bool(buffer.isnan().any())
    lowest = 0 if buffer.dtype == torch.bool or not buffer.dtype.is_signed else torch.iinfo(buffer.dtype).min
    return bool((buffer == lowest).all())


def _initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """transformers' own initialization of one module; what it cannot do stays as it is."""
    owner = _owner(model, module)
    with suppress(Exception):  # models' own code, on parameters without memory; the value tells
        owner._init_weights(module)


def _owner(model: PreTrainedModel, module: nn.Module) -> Any:
    """The innermost model of transformers that a module is in: each initializes its own kinds."""
    owner = model
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and any(part is module for part in candidate.modules()):
            owner = candidate
    return owner


def _built_again(model: PreTrainedModel, module: nn.Module, leaf: str) -> torch.Tensor | None:
    """A buffer of the same module built with memory, from its configuration and its number if it has one; None if it
    wants more.
    """
    config = getattr(module, "config", None) or _owner(model, module).config
    for arguments in ([config], [config, getattr(module, "layer_idx", None)]):
        with suppress(Exception), torch.device("cpu"):  # a class that is built from something else
            return type(module)(*arguments)._buffers.get(leaf)
    return None
