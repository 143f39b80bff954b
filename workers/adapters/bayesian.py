"""Bayesian-LoRA: a low-rank adapter that learns how many ranks and how many bits its factors need.

    y = W_hat x + s * Qb(B) diag(g) Qa(A) x

    A, B     `a` (R, in), `b` (out, R), fp32            trained; R is the rank at the start
    Qa, Qb   gated quantizers of 2, 4, 8 or 16 bits     `workers.adapters.gates`
    g        a gate for each rank                       `gate_rank` (R,)
    b        range of a quantizer                       max |A| * exp(rho), rho = `range_a`, `range_b`
    s        alpha / R

    loss = task loss + mu * penalty,     penalty = sum of expected BOPs / sum of BOPs of all ranks at 16 bits
    BOPs of a linear = tokens * b_x * E[rank] * (in * E[bits of A] + out * E[bits of B]),    b_x = 16

Source: Meo et al., Bayesian-LoRA (arXiv:2406.13046). Only its abstracts were available. From
them: priors over the quantization levels *and* over the rank of the learned low-rank matrices, differentiable gates
for both, found for every low-rank matrix, judged by bit operations. From Bayesian Bits (arXiv:2005.07093), on which
it builds: the residual decomposition, the hard-concrete gates, that the penalty counts bit operations, and the
threshold at the end. Everything else is a reconstruction, and no figure of the paper may be expected of it:

- rank gates are independent of each other, and 2 bits are always on: rank gates are what removes a factor
- one Monte-Carlo sample of the gates a step; the penalty is the expectation itself
- gates are decided for the last 30% of training (`progress`), so that the factors adapt to what is left: Bayesian Bits
  finetunes so, too
- the widest is 16 bits, since the comparison is with the same rank at 16 bits
- ranges are relative to the largest magnitude of the factor at the time, since B starts at 0 and has no range to learn
  from; a floor keeps them from 0
- activations stay at 16 bits and the base is quantized as the job says: the method prices the adapter alone

ADR 12 has the reasons. In evaluation mode gates are decided: on or off. `compact` drops the ranks that are off and
stores both factors as integers with a scale each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from app.domain.adapters import BayesianLoRASpec
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
from workers.numerics.quantized import LowRank

ACTIVATION_BITS = 16
OPEN = 6.0
"""phi at the start: on with a probability of 0.9995."""
SMALLEST_LIMIT = 1e-6
SETTLED_FROM = 0.7
"""Share of the training after which gates are decided."""

Gate = Callable[[Tensor], Tensor]
"""From parameters phi to gates z."""


@dataclass(frozen=True)
class IntegerFactors:
    """What is left of an adapter once gates are decided: update = scale * (b_codes * b_step) @ (a_codes * a_step).

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


class BayesianLoRA(nn.Module):
    """A trainable update of one linear: `forward(x)` is what is added to the base's output.

    While training gates are drawn by torch's own generator: who wants a step again seeds it.

    rates         learning rates of gates and ranges, by name; they are not decayed
    shared_bops   what `penalty` is a share of: all ranks at 16 bits of all adapters that are trained together
    """

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
        self.shared_bops = self.full_bops
        self.rates = dict.fromkeys(("gate_rank", "gate_a", "gate_b", "range_a", "range_b"), spec.gate_learning_rate)
        self.dropout = nn.Dropout(spec.dropout)
        bound = 1 / sqrt(in_features)
        start = torch.rand(spec.rank, in_features, generator=generator) * (2 * bound) - bound

        def parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, device=device))

        self.a = nn.Parameter(start.to(device))
        self.b = parameter(out_features, spec.rank)
        self.gate_rank = parameter(spec.rank, value=OPEN)
        self.gate_a, self.gate_b = (parameter(len(WIDTHS) - 1, value=OPEN) for _ in "ab")
        self.range_a, self.range_b = parameter(), parameter()

    def progress(self, share: float) -> None:
        """Told before a step which share of the training is done: gates are decided for the last part of it."""
        self.settled = share >= SETTLED_FROM

    def penalty(self) -> Tensor:
        """Its term of the loss: mu times its share of the expected bit operations; 0 once gates are decided."""
        if self.settled:
            return self.gate_rank.new_zeros(())
        return self.expected_bops() * (self.spec.penalty / self.shared_bops)

    def forward(self, x: Tensor) -> Tensor:
        """The update, (.., out) in the dtype of `x` (.., in)."""
        a, b, ranks = self._gated(sample if self.training and not self.settled else decide)
        inner = nn.functional.linear(self.dropout(x), a.to(x.dtype)) * (ranks * self.scale).to(x.dtype)
        return nn.functional.linear(inner, b.to(x.dtype))

    def delta_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update with decided gates as a dense matrix, (out, in)."""
        a, b, ranks = (part.to(dtype) for part in self._gated(decide))
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

    def expected_bops(self) -> Tensor:
        """Bit operations a token by the gates' probabilities, differentiable."""
        a, b = self.in_features * expected_bits(self.gate_a), self.out_features * expected_bits(self.gate_b)
        return ACTIVATION_BITS * keep_probability(self.gate_rank).sum() * (a + b)

    @property
    def full_bops(self) -> int:
        """Bit operations a token with all ranks at 16 bits."""
        return full_bops(self.spec, self.in_features, self.out_features)

    def decided_bops(self) -> int:
        """Bit operations a token of what `compact` leaves."""
        a, b = self.in_features * decided_bits(self.gate_a), self.out_features * decided_bits(self.gate_b)
        return ACTIVATION_BITS * int(decide(self.gate_rank).sum()) * (a + b)

    def _gated(self, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
        a = residual_quantize(self.a, _limit(self.a, self.range_a), gate(self.gate_a))
        b = residual_quantize(self.b, _limit(self.b, self.range_b), gate(self.gate_b))
        return a, b, gate(self.gate_rank)


def full_bops(spec: BayesianLoRASpec, in_features: int, out_features: int) -> int:
    """Bit operations a token of an adapter with all ranks at 16 bits."""
    return ACTIVATION_BITS * WIDTHS[-1] * spec.rank * (in_features + out_features)


@dataclass(frozen=True)
class BopsReport:
    """Bit operations a token, decided, against the same ranks at 16 bits; activations count 16 bits everywhere.

    adapter, adapter_16bit   of the adapters alone
    model, model_16bit       with the products of the quantized linears that they stand beside
    ranks, bits              of each linear: what is left, and the widths of A and B
    """

    adapter: int
    adapter_16bit: int
    model: int
    model_16bit: int
    ranks: Mapping[str, int]
    bits: Mapping[str, tuple[int, int]]

    @property
    def adapter_saving(self) -> float:
        """Share of the adapters' bit operations that is saved."""
        return 1 - self.adapter / self.adapter_16bit

    @property
    def model_saving(self) -> float:
        """Share of all bit operations of the linears that is saved."""
        return 1 - self.model / self.model_16bit


@torch.no_grad()
def bops_report(adapters: Mapping[str, BayesianLoRA], base_bits: Mapping[str, int]) -> BopsReport:
    """Of adapters by linear, whose base weights have `base_bits` bits."""
    base = sum(ACTIVATION_BITS * base_bits[name] * a.in_features * a.out_features for name, a in adapters.items())
    decided = sum(adapter.decided_bops() for adapter in adapters.values())
    full = sum(adapter.full_bops for adapter in adapters.values())
    return BopsReport(
        adapter=decided,
        adapter_16bit=full,
        model=base + decided,
        model_16bit=base + full,
        ranks={name: int(decide(a.gate_rank).sum()) for name, a in adapters.items()},
        bits={name: (decided_bits(a.gate_a), decided_bits(a.gate_b)) for name, a in adapters.items()},
    )


def _limit(factor: Tensor, log_range: Tensor) -> Tensor:
    return factor.detach().abs().amax().clamp(min=SMALLEST_LIMIT) * log_range.exp()


def _codes(factor: Tensor, log_range: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, int]:
    bits = decided_bits(phi)
    limit = _limit(factor, log_range)
    step = step_of(limit, bits)
    codes = (residual_quantize(factor, limit, decide(phi)) / step).round()
    return codes.to(torch.int8 if bits <= 8 else torch.int16), step.float(), bits
