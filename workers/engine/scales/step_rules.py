"""Rules of the end-to-end steps beside Adam's: which of them a stage follows is data.

    settled   codes' rate falls to 0 at this part of the steps, and scales go on alone
    averaged  what is kept is the mean over this last part of the steps, of p and of places x, and codes are it rounded
    floor     the last step's rate in parts of the highest, so that a mean is one of many places
    shared    v of a code is the mean of D^2 over its group (Adam-mini, arXiv:2406.16793): a weight whose gradient is
              small beside its group's moves less, in place of as far as all others
    turns     a code that has turned back so often is held at the mean of what it was, rounded (Nagel et al.,
              arXiv:2203.08485)
    trimmed   the part of a chunk's tokens, those of the largest divergence, that has no gradient
    bounded   nats c: a token's weight is 1/(1 + KL/c), that of c*log(1 + KL/c)

Each is off unless a stage asks for it; what they gain is in docs/results.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.scales.moving_codes import MovingCodes
from workers.numerics.backends.place_operators import parts


@dataclass(frozen=True)
class StepRules:
    """Numbers of the rules; all 0 (1 for `settled`): Adam alone."""

    settled: float = 1.0
    averaged: float = 0.0
    floor: float = 0.0
    shared: bool = False
    turns: int = 0
    trimmed: float = 0.0
    bounded: float = 0.0

    def bytes_a_code(self, item: int) -> int:
        """Bytes for each moving code beside those of its place, gradient, m and v; item: of the model's dtype."""
        return (max(4, item) if self.averaged else 0) + (3 + max(2, item // 2) if self.turns else 0)

    def with_floor(self, rates: Tensor, undecayed: Tensor) -> Tensor:
        """Rates of all steps from those that fall to 0 and those that stay, (steps,)."""
        return rates * (1 - self.floor) + undecayed * self.floor

    def of_codes(self, rates: Tensor) -> Tensor:
        """Rates of codes from those of scales, (steps,)."""
        done = torch.arange(len(rates), dtype=rates.dtype, device=rates.device) / max(1, len(rates))
        # Codes' own line takes the place of the scales', which falls to 0 at the end.
        return rates * ((1 - done / self.settled) / (1 - done)).clamp(min=0)

    def weights(self, each: Tensor) -> Tensor | None:
        """Weights of tokens by their divergence (tokens,); None where all have 1."""
        if not self.trimmed and not self.bounded:
            return None
        found = 1 / (1 + each / self.bounded) if self.bounded else torch.ones_like(each)
        if self.trimmed:
            kept = max(1, round(len(each) * (1 - self.trimmed)))
            found = found * (each <= each.sort().values[kept - 1])
        return found


ADAM_ALONE = StepRules()


class Turns:
    """Codes that are held once they have turned back often enough.

    A turn is a change of a code to the other side than its last one. What a code was is averaged over about 1/PACE
    steps; a code with `limit` turns gets that mean, rounded, and keeps it.
    """

    PACE = 0.05

    def __init__(self, codes: MovingCodes, limit: int) -> None:
        self._codes, self._limit, place = codes, limit, codes.place
        self._before = torch.empty_like(place, dtype=torch.int8)
        self._mean = torch.empty_like(place, dtype=torch.float16 if place.dtype == torch.float32 else place.dtype)
        for rows in parts(place):
            self._before[rows] = self._mean[rows] = codes.indices(rows)
        self._side, self._count = torch.zeros_like(self._before), torch.zeros_like(self._before)

    def hold(self) -> None:
        """Looks at what a step has changed, and puts codes back that are held."""
        for rows in parts(self._codes.place):
            place, before, count = self._codes.place[rows], self._before[rows], self._count[rows]
            index, held = self._codes.indices(rows), count >= self._limit
            mean = self._mean[rows].to(place.dtype)
            mean.add_(index - mean, alpha=self.PACE)
            change = (index - before).sign().to(torch.int8).masked_fill_(held, 0)
            count += change * self._side[rows] < 0
            self._side[rows] = torch.where(change == 0, self._side[rows], change)
            settles = (count >= self._limit) & ~held
            index = torch.where(settles, mean.round(), torch.where(held, before.to(place.dtype), index))
            place.copy_(torch.where(settles | held, index, place))
            before.copy_(index)
            self._mean[rows] = mean


class Mean:
    """The mean of tensors over the last steps, in place of them at the end: 1/n of the n-th step's is added.

    first   steps done before the first one that counts
    """

    def __init__(self, tensors: list[Tensor], first: int) -> None:
        self._tensors = tensors
        self._means = [torch.zeros_like(tensor) for tensor in tensors]
        self._first = first

    def add(self, count: Tensor) -> None:
        """Takes a step's result; count: steps done with it, on the device. Before the first, the mean is the result."""
        weight = 1 / (count - self._first).clamp(min=1).to(torch.float32)
        for mean, tensor in zip(self._means, self._tensors, strict=True):
            # Two terms: lerp takes a weight of the tensors' dtype, and 1 must give the result itself.
            mean.mul_(1 - weight).add_(tensor * weight)

    def put(self) -> None:
        """Writes the means into the tensors."""
        for mean, tensor in zip(self._means, self._tensors, strict=True):
            tensor.copy_(mean)
