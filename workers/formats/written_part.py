"""A part of a checkpoint that is on disk, described so that another process can go on after it."""

from pydantic import BaseModel, ConfigDict

from workers.formats.shards import FinishedShard
from workers.formats.stored_linear import StoredLinear, StoredPart


class WrittenPart(BaseModel):
    """All that a writer has made durable since the part before.

    tensors   of the source that need not be written any more
    linears   by name in the checkpoint
    parts     places of linears that are a part of a tensor, by name; some of them are not quantized
    """

    model_config = ConfigDict(frozen=True)

    shards: tuple[FinishedShard, ...]
    tensors: tuple[str, ...]
    linears: dict[str, StoredLinear]
    parts: dict[str, StoredPart]
