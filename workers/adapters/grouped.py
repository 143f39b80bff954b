"""One class for LoRA, QA-LoRA, Q-BaRA, QA-HiRA and QA-BLoRA, which differ in numbers, not in code.

    y = W_hat x + s * U(B A P(x))          a pair of low rank
    y = W_hat x + s * U(M P(x))            a single matrix

    x      inputs                                     (.., in), compute dtype
    P      mean over `pool_in` = p neighbours          (.., in/p)
    A, B   `a` (r', in/p) and `b` (out/q, r'), fp32    trained
    M      `m` (out/q, in/p), fp32                     trained
    U      each output `repeat_out` = q times          (.., out)
    s      alpha / r; times p where pools are summed   r of the request, not r'

The same as a dense update, with 1 a matrix of ones and (x) the Kronecker product:

    Delta W = (s/p) * (B A) (x) 1_{q x p}              of rank at most min(r', in/p, out/q)
    Delta W = (s/p) *   M   (x) 1_{q x p}              of rank at most min(in/p, out/q)

and where p is a multiple of the group g, one number per group of a row: `group_delta`.

Papers: QLoRA (arXiv:2305.14314), QA-LoRA (arXiv:2309.14717), Q-BaRA and QA-HiRA (arXiv:2407.17029, whose second version
calls them Q-BLoRA and QA-BLoRA). The text of the last one was not available: p, q and s are those of the authors' code,
which for QA-HiRA has (4, 8), no multiple of any usual group. Here the pool is always a multiple of the group, and the
size of tiles follows from the number of parameters (`app.domain.adapters.shapes.shape_for`).

Different from the authors' code: M starts at 0, not at random numbers, so that training starts at the base as it does
with B = 0 (M has a gradient there, as B has). Parameters are fp32, since steps of 1e-5 vanish in bf16; the products are
in the inputs' dtype. Groups must be consecutive columns: an order by activations would break the pools.
"""

from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn

from app.domain.adapters import AdapterShape, AdapterSpec, BayesianLoRASpec
from app.domain.adapters.shapes import shape_for
from app.domain.methods.schemes import group_width
from bitwright.errors import InternalError, MisalignedAdapter
from workers.adapters.adapter import Adapter
from workers.numerics.quantized import LinearResult, LowRank


class GroupedAdapter(Adapter):
    """A trainable update of one linear: `forward(x)` is added to the base's output.

    A pair has parameters `a` and `b`, a single matrix `m`.

    generator   draws the initial A, uniform in +-1/sqrt(in/p) (kaiming with a = sqrt 5, as LoRA has it)
    """

    def __init__(
        self,
        shape: AdapterShape,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.dropout, self.draws_noise = nn.Dropout(dropout), dropout > 0

        def zeros(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, columns, device=device))

        if shape.form == "single":
            self.m = zeros(shape.distinct, shape.pooled)
            return
        bound = 1 / sqrt(shape.pooled)
        start = torch.rand(shape.rank, shape.pooled, generator=generator) * (2 * bound) - bound
        self.a = nn.Parameter(start.to(device))
        self.b = zeros(shape.distinct, shape.rank)

    @classmethod
    def beside(cls, spec: AdapterSpec, result: LinearResult, generator: torch.Generator) -> Self:
        """The adapter in the shape that the spec takes at this linear."""
        if isinstance(spec, BayesianLoRASpec):
            raise InternalError(f"a {spec.kind} has no fixed shape", field="adapter.kind")
        out_features, in_features = result.weight.shape
        shape = shape_for(spec, in_features, out_features, result.weight.scheme.group_size)
        return cls(shape, spec.dropout, device=result.weight.codes.device, generator=generator)

    @classmethod
    def continued(cls, spec: AdapterSpec, low_rank: LowRank, name: str) -> Self:
        """A LoRA that goes on from a method's factors (LoftQ, ApiQ, LQ-LoRA), bit for bit.

        Its strength is that of the factors: alpha / rank of `low_rank`, regardless of the request (ADR 11).
        """
        if spec.kind != "lora":
            return super().continued(spec, low_rank, name)
        (rank, in_features), out_features = low_rank.a.shape, low_rank.b.shape[0]
        shape = AdapterShape(in_features, out_features, 1, 1, "pair", rank, low_rank.alpha, rank)
        adapter = cls(shape, spec.dropout, device=low_rank.a.device)
        adapter.load_state_dict({"a": low_rank.a.float(), "b": low_rank.b.float()})
        return adapter

    @property
    def is_stock(self) -> bool:
        return (self.shape.pool_in, self.shape.repeat_out, self.shape.form) == (1, 1, "pair")

    @property
    def inner_rank(self) -> int:
        return self.shape.rank

    @property
    def stored_bits(self) -> int:
        """Bits of the fp32 parameters."""
        return 32 * self.shape.parameters

    @property
    def flops_per_token(self) -> int:
        return self.shape.flops_per_token

    def stored(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        shape = self.shape
        facts: dict[str, object] = {"form": shape.form, "pool_in": shape.pool_in, "repeat_out": shape.repeat_out}
        facts |= {"scale": shape.scale, "rank": shape.rank}
        return facts, {name: p.detach().cpu().clone() for name, p in self.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        """The update, (.., out) in the dtype of `x` (.., in)."""
        shape = self.shape
        pooled = x if shape.pool_in == 1 else x.reshape(*x.shape[:-1], shape.pooled, shape.pool_in).mean(-1)
        pooled = self.dropout(pooled)
        if shape.form == "single":
            distinct = nn.functional.linear(pooled, self.m.to(x.dtype)) * shape.scale
        else:
            inner = nn.functional.linear(pooled, self.a.to(x.dtype)) * shape.scale
            distinct = nn.functional.linear(inner, self.b.to(x.dtype))
        return distinct if shape.repeat_out == 1 else distinct.repeat_interleave(shape.repeat_out, -1)

    def tile_delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update as one number per tile: (s/p) BA or (s/p) M, (out/q, in/p)."""
        product = self.m.to(dtype) if self.shape.form == "single" else self.b.to(dtype) @ self.a.to(dtype)
        return product * (self.shape.scale / self.shape.pool_in)

    def delta_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update as a dense matrix, (out, in)."""
        tiles = self.tile_delta(dtype)
        return tiles.repeat_interleave(self.shape.repeat_out, 0).repeat_interleave(self.shape.pool_in, 1)

    def group_delta(self, group_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sum that the update adds to each group of `group_size` columns (-1: a row), (out, groups).

        Raises:
            MisalignedAdapter: a group lies in several tiles, so that the update is not one number for it.
        """
        shape = self.shape
        group = group_width(group_size, shape.in_features)
        if shape.pool_in % group:
            raise MisalignedAdapter(
                f"the update is constant over {shape.pool_in} inputs, and a group has {group}",
                field="adapter.pool_in",
                value=shape.pool_in,
                hint="merge it in 16 bits, or train an adapter whose pools are multiples of the group size",
            )
        tiles = self.tile_delta(dtype)
        return tiles.repeat_interleave(shape.repeat_out, 0).repeat_interleave(shape.pool_in // group, 1)

    @torch.no_grad()
    def low_rank(self, dtype: torch.dtype = torch.float32) -> LowRank:
        """The same update as peft's factors, (r', in) and (out, r'): a LoRA's own; other kinds' spread out.

        For a single matrix r' is in/p, and the factor A is the pooling itself.
        """
        shape = self.shape
        if shape.form == "single":
            narrow, wide = torch.eye(shape.pooled, device=self.m.device), self.m
        else:
            narrow, wide = self.a, self.b
        a, b = narrow.repeat_interleave(shape.pool_in, 1), wide.repeat_interleave(shape.repeat_out, 0)
        if (shape.pool_in, shape.rank) == (1, shape.nominal_rank) and shape.form == "pair":
            return LowRank(a.detach().to(dtype), b.detach().to(dtype), shape.alpha)
        return LowRank(a.detach().to(dtype), b.detach().to(dtype), shape.scale / shape.pool_in * len(a))
