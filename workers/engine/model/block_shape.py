"""Shape of a block: what it shares with every block that computes the same of other weights."""

from torch import nn

PLAIN = (bool, int, float, str, type(None))
NOT_SHAPE = frozenset({"training", "layer_idx"})
"""Plain attributes of modules that differ from block to block without changing what a block computes."""


def shape_of(block: nn.Module) -> tuple[object, ...]:
    """The properties that two blocks share if the same captured steps can compute them."""
    tensors = [(name, tuple(t.shape), t.dtype) for name, t in block.state_dict(keep_vars=True).items()]
    return (*tensors, *((name, type(module), _plain_attributes(module)) for name, module in block.named_modules()))


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, object], ...]:
    attributes = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, PLAIN)}
    return tuple(sorted((k, v) for k, v in attributes.items() if k not in NOT_SHAPE))
