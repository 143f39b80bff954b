"""Modules that are linears under another class, as `nn.Linear`: the whole engine then sees ordinary ones."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def as_linears(blocks: nn.Module) -> frozenset[str]:
    """Puts an `nn.Linear` without memory in place of each `Conv1D`; full names, below `blocks`, of their weights.

    A `Conv1D` holds its weight (in, out): whoever reads one from a file transposes it.
    """
    found = {name: module for name, module in blocks.named_modules() if isinstance(module, Conv1D)}
    for name, module in found.items():
        width, out = module.weight.shape
        linear = nn.Linear(width, out, device="meta", dtype=module.weight.dtype).requires_grad_(False)
        blocks.set_submodule(name, linear)
    return frozenset(f"{name}.weight" for name in found)
