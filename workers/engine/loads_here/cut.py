"""The smallest valid checkpoint of a model: its first block, with embeddings, norms and head as they are.

The configuration is the model's own with one layer, and what it has for each layer, by number or place, is that of the
first. Most types are models with one layer as with many; where one is not, transformers does not load the cut model
even unquantized, and `workers.engine.loads_here.block` blames nobody.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.domain.weight_targets import text_config
from workers.engine.model.checkpoint import Checkpoint, StoredTensor, with_tie
from workers.engine.model.streamed_model import StreamedModel
from workers.formats.shards import SHARD_BYTES, ShardWriter, write_json
from workers.formats.source_files import copy_files, without_code

LAYERS = "num_hidden_layers"
FURTHER = "num_nextn_predict_layers"
"""Blocks that predict further tokens, which go with those that are left out."""
TOKENS = ("token_id", "token_ids")
"""Endings of fields that list tokens, which may happen to be as many as there are layers."""


class NotOneBlockError(Exception):
    """A model of which no single block can be had; the message says why."""


@dataclass(frozen=True)
class CutCheckpoint:
    """A source of one block, as the writers of formats read it."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    whole: Checkpoint

    def read(self, name: str) -> Tensor:
        """A tensor on the host."""
        return self.whole.read(name)


def first_block(model: StreamedModel) -> CutCheckpoint:
    """The checkpoint of a model's first block.

    Raises:
        NotOneBlockError: tensors of several blocks lie in one, or the configuration does not number its layers.
    """
    checkpoint = model.checkpoint
    blocks = [model.layout.block(index) + "." for index in range(len(model.blocks))]
    later, kept = set[str](), set[str]()
    for parameter in model.names.parameters:
        own = any(parameter.startswith(prefix) for prefix in blocks[1:])
        (later if own else kept).update(model.names.stored_names(parameter))
    kept |= {name for buffer in model.names.buffers for name in model.names.stored_names(buffer)} - later
    if later & kept:
        raise NotOneBlockError(f"{min(later & kept)} holds more than one block")
    config = one_layer(checkpoint.config, model)
    tensors = {name: checkpoint.tensors[name] for name in checkpoint.tensors if name in kept}
    return CutCheckpoint(checkpoint.folder, config, tensors, checkpoint)


def untied(cut: CutCheckpoint, model: StreamedModel) -> CutCheckpoint:
    """The same as if its head, which is the embedding matrix, were stored besides; as it is where it has its own."""
    embeddings, head = model.names.own_name(f"{model.layout.embeddings}.weight"), f"{model.layout.head}.weight"
    if not model.tied or embeddings is None:
        return cut
    whole = cut.whole.untied(embeddings, head)
    tensors = {**cut.tensors, head: whole.tensors[head]}
    return CutCheckpoint(cut.folder, with_tie(cut.config, tied=False), tensors, whole)


def one_layer(config: Mapping[str, Any], model: StreamedModel) -> dict[str, Any]:
    """A configuration with one layer.

    Raises:
        NotOneBlockError: it does not say how many the model has.
    """
    cut = deepcopy(dict(config))
    text = text_config(cut)
    names = getattr(type(model.config.get_text_config()), "attribute_map", {})
    field, count = names.get(LAYERS, LAYERS), len(model.blocks)
    if not isinstance(text, dict) or text.get(field) != count:
        raise NotOneBlockError(f"config.json does not say in {field} that the model has {count} layers")
    for name, value in text.items():
        text[name] = value if name.endswith(TOKENS) else _of_first_layer(value, count)
    text[field] = 1
    if text.get(FURTHER):
        text[FURTHER] = 0
    return cut


def _of_first_layer(value: object, layers: int) -> object:
    """A field's value without what it has for other layers: a list with an entry for each, or a table by number."""
    if isinstance(value, list) and len(value) == layers:
        return value[:1]
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return {key: entry for key, entry in value.items() if int(key) == 0}
    return value


def write_plain(source: CutCheckpoint, folder: Path) -> None:
    """The cut model unquantized, by nothing that a format has: what shows that it is a model at all."""
    folder.mkdir(parents=True)
    shards = ShardWriter(folder, "model", SHARD_BYTES)
    for name in source.tensors:
        shards.add({name: source.read(name)})
    shards.finish()
    write_json(folder / "config.json", without_code(source.config))
    copy_files(source.folder, folder)
