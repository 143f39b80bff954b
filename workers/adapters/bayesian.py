"""Bayesian-LoRA: a low-rank adapter that learns how many ranks and how many bits its factors need.

    y = W_hat x + s * Qb(B) diag(g) Qa(A) x

    A, B     `a` (R, in), `b` (out, R), fp32            trained; R is the rank at the start
    Qa, Qb   gated quantizers of 2, 4, 8 or 16 bits     `workers.adapters.gates`
    g        one gate per rank                          `gate_rank` (R,)
    b        range of a quantizer                       max |A| * exp(rho), rho = `range_a`, `range_b`
    s        alpha / R

    loss = task loss + mu * penalty,     penalty = sum of expected BOPs / sum of BOPs of all ranks at 16 bits
    BOPs of a linear = tokens * b_x * E[rank] * (in * E[bits of A] + out * E[bits of B]),    b_x = 16

Source: Meo et al., Bayesian-LoRA (arXiv:2406.13046). Only its abstracts were available. From them: priors over the
quantization levels *and* over the rank of the learned low-rank matrices, differentiable gates for both, learned for
every low-rank matrix, evaluated by bit operations. From Bayesian Bits (arXiv:2005.07093), on which it builds: the
residual decomposition, the hard-concrete gates, that the penalty counts bit operations, and the threshold at the end.
Everything else is a reconstruction, and no figure of the paper may be expected of it:

- rank gates are independent of each other, and 2 bits are always on: only rank gates remove a factor
- one Monte-Carlo sample of the gates per step; the penalty is the expectation itself
- gates are decided, and held, for the last 30% of training (`progress`), so that the factors adapt to the rest;
  Bayesian Bits finetunes in this way, too
- the widest is 16 bits, since the comparison is with the same rank at 16 bits
- ranges are relative to the largest magnitude of the factor at the time, since B starts at 0 and has no range to learn
  from; a floor keeps them from 0
- activations stay at 16 bits and the base is quantized as the job says: the method prices the adapter alone

ADR 12 gives the reasons. In evaluation mode gates are decided: on or off. `compact` drops the ranks that are off and
stores both factors as integers with a scale each.

Cost: the gated tensors are small but take about fifty operators per factor in the forward pass alone. So adapters of
one shape are gated in one stack (`together`): the number of operators, not the sizes, decides the time of a step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from app.domain.adapters import AdapterSpec, BayesianLoRASpec
from bitwright.errors import InternalError
from bitwright.report import BitOperations
from workers.adapters.adapter import Adapter
from workers.adapters.gates import (
    WIDTHS,
    decide,
    decided_bits,
    expected_bits,
    keep_probability,
    residual_quantize,
    sample,
    step_of,
)
from workers.numerics.quantized import LinearResult, LowRank

ACTIVATION_BITS = 16
OPEN = 6.0
"""phi at the start: on with a probability of 0.9995."""
SMALLEST_LIMIT = 1e-6
GATED_BYTES = 60
"""Bytes that the graph of a gated factor keeps per number: about a dozen tensors of its size, in fp32."""
RANGE_RATE = 0.02
"""Learning rate of the logarithms of ranges: at the gates' rate in a short training, 0.27, losses were higher."""
SETTLED_FROM = 0.7
"""Share of the training after which gates are decided."""

Gated = tuple[Tensor, Tensor, Tensor]
"""Qa(A) (R, in), Qb(B) (out, R) and the gates of the ranks, (R,)."""


@dataclass(frozen=True)
class IntegerFactors:
    """The rest of an adapter after gates are decided: update = scale * (b_codes * b_step) @ (a_codes * a_step).

    a_codes   int8 or int16 (rank, in), of `a_bits` bits; b_codes the same, (out, rank)
    a_step    fp32 (), b_step fp32 ()
    """

    a_codes: Tensor
    a_step: Tensor
    a_bits: int
    b_codes: Tensor
    b_step: Tensor
    b_bits: int
    scale: float

    @property
    def rank(self) -> int:
        return self.a_codes.shape[0]

    def low_rank(self, dtype: torch.dtype = torch.float32) -> LowRank | None:
        """The factors as peft's LoRA, (rank, in) and (out, rank); None if no rank is left."""
        if not self.rank:
            return None
        a, b = self.a_codes.float() * self.a_step, self.b_codes.float() * self.b_step
        return LowRank(a.to(dtype), b.to(dtype), self.scale * self.rank)

    def stored_bits(self) -> int:
        """Bits of codes, packed, and of both steps."""
        return self.a_codes.numel() * self.a_bits + self.b_codes.numel() * self.b_bits + 2 * 32


class BayesianLoRA(Adapter):
    """A trainable update of one linear: `forward(x)` is added to the base's output.

    While training, gates are drawn by torch's own generator: seed it to repeat a step.

    rates   learning rates of gates and ranges, by name; they are not decayed
    """

    pass_bytes: ClassVar[int] = GATED_BYTES

    def __init__(
        self,
        spec: BayesianLoRASpec,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.scale, self.settled = spec.alpha / spec.rank, False
        self._drawn: Gated | None = None
        self.rates = dict.fromkeys(("gate_rank", "gate_a", "gate_b"), spec.gate_learning_rate)
        self.rates |= dict.fromkeys(("range_a", "range_b"), RANGE_RATE)
        self.dropout, self.draws_noise = nn.Dropout(spec.dropout), spec.dropout > 0
        bound = 1 / sqrt(in_features)
        start = torch.rand(spec.rank, in_features, generator=generator) * (2 * bound) - bound

        def parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, device=device))

        self.a = nn.Parameter(start.to(device))
        self.b = parameter(out_features, spec.rank)
        self.gate_rank = parameter(spec.rank, value=OPEN)
        self.gate_a, self.gate_b = (parameter(len(WIDTHS) - 1, value=OPEN) for _ in "ab")
        self.range_a, self.range_b = parameter(), parameter()

    @classmethod
    def beside(cls, spec: AdapterSpec, result: LinearResult, generator: torch.Generator) -> Self:
        if not isinstance(spec, BayesianLoRASpec):
            raise InternalError(f"a {spec.kind} has no gates", field="adapter.kind")
        out_features, in_features = result.weight.shape
        return cls(spec, in_features, out_features, device=result.weight.codes.device, generator=generator)

    def progress(self, share: float) -> None:
        """Decides and holds the gates for the last part of the training, by the `share` of it that is done."""
        self.settled = share >= SETTLED_FROM
        for gate in (self.gate_rank, self.gate_a, self.gate_b):
            gate.requires_grad_(not self.settled)

    @classmethod
    @contextmanager
    def together(cls, adapters: Sequence[Self]) -> Iterator[None]:
        """Context in which calls of these adapters share factors and gates that were computed, and drawn, once."""
        for alike in _by_shape(adapters):
            for adapter, drawn in zip(alike, _gated(alike), strict=True):
                adapter._drawn = drawn
        try:
            yield
        finally:
            for adapter in adapters:
                adapter._drawn = None

    @classmethod
    def penalty(cls, adapters: Sequence[Self]) -> Tensor:
        """The term of the loss of all adapters that are trained together; 0 once gates are decided."""
        first = adapters[0]
        if first.settled:
            return first.gate_rank.new_zeros(())
        return expected_bops(adapters) * (first.spec.penalty / sum(adapter.full_bops for adapter in adapters))

    def forward(self, x: Tensor) -> Tensor:
        """The update, (.., out) in the dtype of `x` (.., in)."""
        a, b, ranks = _gated([self])[0] if self._drawn is None else self._drawn
        inner = nn.functional.linear(self.dropout(x), a.to(x.dtype)) * (ranks * self.scale).to(x.dtype)
        return nn.functional.linear(inner, b.to(x.dtype))

    def delta_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update with decided gates as a dense matrix, (out, in)."""
        (decided,) = _gated([self], held=True)
        a, b, ranks = (factor.to(dtype) for factor in decided)
        return (b * ranks) @ a * self.scale

    @torch.no_grad()
    def compact(self) -> IntegerFactors:
        """The decided adapter: ranks that are off are gone, factors are integers."""
        on = decide(self.gate_rank).bool()
        a_codes, a_step, a_bits = _codes(self.a, self.range_a, self.gate_a)
        b_codes, b_step, b_bits = _codes(self.b, self.range_b, self.gate_b)
        return IntegerFactors(
            a_codes[on].contiguous(), a_step, a_bits, b_codes[:, on].contiguous(), b_step, b_bits, self.scale
        )

    def low_rank(self, dtype: torch.dtype = torch.float32) -> LowRank | None:
        """The decided adapter as peft's factors; None if no rank is left."""
        return self.compact().low_rank(dtype)

    def group_delta(self, group_size: int, dtype: torch.dtype = torch.float64) -> Tensor:  # noqa: ARG002 - no one number
        raise InternalError("a bayesian-lora merges in floating point alone", field="merge")

    @property
    def is_stock(self) -> bool:
        return True

    @property
    def inner_rank(self) -> int:
        return int(decide(self.gate_rank).sum())

    @property
    def stored_bits(self) -> int:
        """Bits of the integers and their steps."""
        return self.compact().stored_bits()

    @property
    def flops_per_token(self) -> int:
        return 2 * self.inner_rank * (self.in_features + self.out_features)

    def stored(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        left = self.compact()
        tensors = {"a_codes": left.a_codes, "a_step": left.a_step, "b_codes": left.b_codes, "b_step": left.b_step}
        facts: dict[str, object] = {"form": "integer", "a_bits": left.a_bits, "b_bits": left.b_bits}
        facts |= {"pool_in": 1, "repeat_out": 1, "scale": left.scale, "rank": left.rank}
        return facts, {name: t.cpu() for name, t in tensors.items()} if left.rank else {}

    @classmethod
    def bit_operations(cls, adapters: Mapping[str, Self], base_bits: Mapping[str, int]) -> BitOperations:
        return bops_report(adapters, base_bits)

    @property
    def full_bops(self) -> int:
        """Bit operations per token with all ranks at 16 bits."""
        return ACTIVATION_BITS * WIDTHS[-1] * self.spec.rank * (self.in_features + self.out_features)

    def decided_bops(self) -> int:
        """Bit operations per token of the adapter that `compact` returns."""
        a, b = self.in_features * decided_bits(self.gate_a), self.out_features * decided_bits(self.gate_b)
        return ACTIVATION_BITS * int(decide(self.gate_rank).sum()) * (a + b)


def expected_bops(adapters: Iterable[BayesianLoRA]) -> Tensor:
    """Bit operations per token of all adapters by their gates' probabilities, differentiable, ()."""
    parts = []
    for alike in _by_shape(adapters):
        a, b = (expected_bits(_stacked(alike, gate)) for gate in ("gate_a", "gate_b"))
        kept = keep_probability(_stacked(alike, "gate_rank")).sum(-1)
        parts.append((kept * (alike[0].in_features * a + alike[0].out_features * b)).sum())
    return ACTIVATION_BITS * torch.stack(parts).sum()


@torch.no_grad()
def bops_report(adapters: Mapping[str, BayesianLoRA], base_bits: Mapping[str, int]) -> BitOperations:
    """Bit operations per token, decided, against the same ranks at 16 bits; activations count 16 bits everywhere.

    adapters    by linear, whose base weights have `base_bits` bits
    """
    base = sum(ACTIVATION_BITS * base_bits[name] * a.in_features * a.out_features for name, a in adapters.items())
    decided = sum(adapter.decided_bops() for adapter in adapters.values())
    full = sum(adapter.full_bops for adapter in adapters.values())
    return BitOperations(
        adapter=decided,
        adapter_16bit=full,
        adapter_saving=1 - decided / full,
        model=base + decided,
        model_16bit=base + full,
        model_saving=1 - (base + decided) / (base + full),
        ranks={name: a.inner_rank for name, a in adapters.items()},
        bits={name: (decided_bits(a.gate_a), decided_bits(a.gate_b)) for name, a in adapters.items()},
    )


def _by_shape(adapters: Iterable[BayesianLoRA]) -> list[list[BayesianLoRA]]:
    by_shape: dict[tuple[int, int, int], list[BayesianLoRA]] = {}
    for adapter in adapters:
        by_shape.setdefault((*adapter.b.shape, adapter.in_features), []).append(adapter)
    return list(by_shape.values())


def _stacked(alike: Sequence[BayesianLoRA], name: str) -> Tensor:
    return torch.stack([getattr(adapter, name) for adapter in alike])


def _gated(alike: Sequence[BayesianLoRA], *, held: bool = False) -> list[Gated]:
    """Quantized factors and gates of adapters of one shape and state; decided if held, settled or not in training."""
    first = alike[0]
    gate = decide if held or first.settled or not first.training else sample
    a, b = (
        _quantized(_stacked(alike, factor), _stacked(alike, log_range), gate(_stacked(alike, phi)))
        for factor, log_range, phi in (("a", "range_a", "gate_a"), ("b", "range_b", "gate_b"))
    )
    return list(zip(a.unbind(), b.unbind(), gate(_stacked(alike, "gate_rank")).unbind(), strict=True))


def _quantized(factors: Tensor, log_ranges: Tensor, gates: Tensor) -> Tensor:
    """Factors (count, .., ..) quantized, each with a range (count,) and gates (count, 3)."""
    return residual_quantize(factors, _limits(factors, log_ranges)[:, None, None], gates.T[..., None, None])


def _limits(factors: Tensor, log_ranges: Tensor) -> Tensor:
    """The range b of factors (.., rows, columns)."""
    return factors.detach().abs().amax((-2, -1)).clamp(min=SMALLEST_LIMIT) * log_ranges.exp()


def _codes(factor: Tensor, log_range: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, int]:
    bits = decided_bits(phi)
    limit = _limits(factor, log_range)
    step = step_of(limit, bits)
    codes = (residual_quantize(factor, limit, decide(phi)) / step).round()
    return codes.to(torch.int8 if bits <= 8 else torch.int16), step.float(), bits
