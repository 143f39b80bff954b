"""Module paths of a causal language model, found in the model that transformers has built: there is no table.

transformers says which modules are decoder, embeddings and head; the blocks are the one list under the decoder that is
as long as the configuration says. `workers.engine.model.dry_run` finds out what only a call shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bitwright.errors import UnsupportedArchitecture
from workers.contracts.blocks import Fold
from workers.engine.model.special_cases import FOLDS

HINT = "quantize its weights alone where the method needs no calls (rtn, nf), or choose another model"


@dataclass(frozen=True)
class Layout:
    """Module paths of a causal language model.

    owner       the module that calls decoder and head and returns logits; "" is the model itself
    decoder     the module whose forward makes masks and rotary embeddings and runs the blocks
    embeddings  the matrix that token ids pick rows of
    blocks      the decoder's list of blocks
    head        the linear that makes logits
    outer       modules of the decoder outside the blocks that have parameters, the embeddings among them
    folds       where scales can move inside a block; none where nobody has proved it
    """

    owner: str
    decoder: str
    embeddings: str
    blocks: str
    head: str
    outer: tuple[str, ...]
    folds: tuple[Fold, ...] = ()

    def block(self, index: int) -> str:
        """Full module name of a block."""
        return f"{self.blocks}.{index}"

    @property
    def body(self) -> str:
        """The module that the owner calls for hidden states: the decoder, or the part of a model that it is in."""
        start = f"{self.owner}." if self.owner else ""
        return start + self.decoder.removeprefix(start).partition(".")[0]


def layout_of(model: PreTrainedModel) -> Layout:
    """The paths of a model, which may be without weights.

    Raises:
        UnsupportedArchitecture: its decoder, blocks or head cannot be found.
    """
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    embeddings = model.get_input_embeddings()
    decoder = _decoder(model, embeddings)
    head, owner = _head(model, names)
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    blocks = _blocks(decoder, layers)
    start = names[id(decoder)]
    if not start or blocks is None:
        detail = f"{type(model).__name__} has no list of {layers} blocks under its decoder"
        raise UnsupportedArchitecture(detail, field="model", value=model.config.model_type, hint=HINT)
    paths = names | {id(blocks): names[id(blocks)]}
    folds = next((FOLDS.get(type(block).__name__, ()) for block in blocks), ())
    return Layout(
        owner=owner,
        decoder=start,
        embeddings=paths[id(embeddings)],
        blocks=paths[id(blocks)],
        head=head,
        outer=tuple(_outer(decoder, start, paths[id(blocks)])),
        folds=folds,
    )


def _decoder(model: PreTrainedModel, embeddings: nn.Module) -> nn.Module:
    """The innermost model with these embeddings in what transformers calls the decoder: wrappers have several."""
    found: nn.Module = model.get_decoder()
    inside = [module for module in found.modules() if isinstance(module, PreTrainedModel)]
    return next((m for m in reversed(inside) if any(part is embeddings for part in m.modules())), found)


def _head(model: PreTrainedModel, names: dict[int, str]) -> tuple[str, str]:
    """Full name of the head, and of the innermost model that owns it: a wrapper may only pass on its logits."""
    owners = [
        (head, module)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and isinstance(head := module.get_output_embeddings(), nn.Module)
    ]
    if owners:
        head, owner = next(pair for pair in reversed(owners) if pair[0] is owners[0][0])
        return names[id(head)], names[id(owner)]
    detail = f"{type(model).__name__} has no head that makes logits"
    raise UnsupportedArchitecture(detail, field="model", value=model.config.model_type, hint=HINT)


def _blocks(decoder: nn.Module, layers: int) -> nn.ModuleList | None:
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    own = [each for each in lists if all(isinstance(child, GradientCheckpointingLayer) for child in each)]
    return next(iter(own or lists), None)


def _outer(decoder: nn.Module, name: str, blocks: str) -> Iterator[str]:
    """Names of the decoder's parts with parameters that are not, and do not hold, the blocks."""
    for leaf, weight in decoder._parameters.items():
        if weight is not None:
            yield f"{name}.{leaf}"
    for leaf, child in decoder.named_children():
        path = f"{name}.{leaf}"
        if blocks.startswith(f"{path}."):
            yield from _outer(child, path, blocks)
        elif path != blocks and next(child.parameters(), None) is not None:
            yield path
