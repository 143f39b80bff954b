"""Description of a quantized linear beside its tensors in a checkpoint: its form, scheme and low-rank correction."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from app.domain.methods import Form, Scheme, SchemeName
from workers.numerics.quantized import AffineWeight, CodebookWeight, FloatWeight, LinearResult, QuantizedAbsmax


class Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredAbsmax(Description):
    """The second level of a codebook weight's absmax: width of its codes, and groups that share a scale."""

    bits: int = Field(ge=1, le=8)
    superblock: int = Field(ge=1)


class StoredLowRank(Description):
    """The low-rank correction beside a weight."""

    rank: int = Field(ge=1)
    alpha: float


class StoredPart(Description):
    """The place of a linear's weight (out, in) in a tensor of the source that holds more, or holds it transposed.

    of          the source's name of that tensor
    index       along its first dimension; None: it has two
    rows        start, stop and step along out
    transposed  whether out is its last dimension
    """

    of: str
    index: int | None = None
    rows: tuple[int, int, int]
    transposed: bool = False

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight's place in the tensor."""
        matrix = whole if self.index is None else whole[self.index]
        start, stop, step = self.rows
        return (matrix.T if self.transposed else matrix)[start:stop:step]


class StoredLinear(Description):
    """The facts on a linear that its tensors do not show.

    dtype     torch's name of the dequantized weight's dtype
    absmax    None: one floating-point number per group
    scheme_name  None: integers or a codebook, of which the other fields say all
    input_amax   whether the largest magnitude of the inputs is stored
    """

    form: Literal[Form.AFFINE, Form.CODEBOOK, Form.FLOAT, Form.BLOCKS]
    bits: int
    group_size: int
    symmetric: bool
    dtype: str
    offset: bool = False
    absmax: StoredAbsmax | None = None
    low_rank: StoredLowRank | None = None
    scheme_name: SchemeName | None = None
    input_amax: bool = False

    @classmethod
    def of(cls, result: LinearResult) -> "StoredLinear":
        weight, low_rank = result.weight, result.low_rank
        absmax = weight.absmax if isinstance(weight, CodebookWeight) else None
        second = None
        if isinstance(absmax, QuantizedAbsmax):
            second = StoredAbsmax(bits=absmax.bits, superblock=absmax.superblock)
        return cls(
            form=weight.form,
            **weight.scheme.model_dump(exclude={"name"}),
            scheme_name=weight.scheme.name,
            input_amax=isinstance(weight, FloatWeight) and weight.input_amax is not None,
            dtype=str(weight.dtype).removeprefix("torch."),
            offset=isinstance(weight, AffineWeight) and weight.offset is not None,
            absmax=second,
            low_rank=None if low_rank is None else StoredLowRank(rank=low_rank.rank, alpha=low_rank.alpha),
        )

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, name=self.scheme_name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
