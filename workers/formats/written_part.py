"""A part of a checkpoint that is on disk, described so that another process can go on after it."""

from pydantic import BaseModel, ConfigDict

from workers.formats.shards import FinishedShard
from workers.formats.stored_linear import StoredLinear


class StackedPlace(BaseModel):
    """Place of a linear in a tensor of the source that holds several: fused experts, (experts, out, in) or
    (experts, in, out) where `transposed`.

    first, step   of its outputs among those of the tensor
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str
    shape: tuple[int, int, int]
    expert: int
    first: int = 0
    step: int = 1
    transposed: bool = False


class WrittenPart(BaseModel):
    """All that a writer has made durable since the part before.

    tensors   of the source that need not be written any more
    linears   by name in the checkpoint; `stacked` those that are a part of a tensor
    """

    model_config = ConfigDict(frozen=True)

    shards: tuple[FinishedShard, ...]
    tensors: tuple[str, ...]
    linears: dict[str, StoredLinear]
    stacked: dict[str, StackedPlace]
