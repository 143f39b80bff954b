"""Places of codes that move end to end, in torch's operators: formulas in `workers.engine.scales.moving_codes`.

`workers.numerics.backends.scale_kernels` has the same in one pass each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from app.domain.methods.named_schemes import Element
from workers.numerics.floats.elements import from_index

CACHED_ELEMENTS = 131_072
"""Elements of a chunk on a CPU: a few fp32 tensors of this size fit the second-level cache."""
CHUNK_ELEMENTS = CACHED_ELEMENTS << 8


@dataclass(frozen=True)
class Places:
    """Places of many groups, and what Adam keeps of them.

    place                   x, (groups, G), fp32 or fp64
    gradient, mean, square  D, m and v, (groups, G); v may be (groups, 1), the mean over a group
    low, high               the smallest and the largest index
    box                     the farthest that a place goes beyond them
    tiny                    added to the root
    fp4                     whether values are those of E2M1, else the indices themselves
    """

    place: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    low: int
    high: int
    box: float
    tiny: float
    fp4: bool = False

    def values(self, rows: slice) -> Tensor:
        """Values of the codes of some groups, a new tensor of the places' dtype."""
        index = self.place[rows].round().clamp_(self.low, self.high)
        return from_index(index, Element.E2M1) if self.fp4 else index


def move_places(places: Places, pace: Tensor, unbiased: Tensor, betas: tuple[float, float]) -> None:
    """A step of Adam; a gradient that is not finite counts as 0.

    pace      the rate over 1 - b1^i, a number on the device
    unbiased  1 - b2^i, the same
    """
    for rows in parts(places.place):
        place = places.place[rows]
        gradient = places.gradient[rows].to(place.dtype).nan_to_num_(0.0, 0.0, 0.0)
        mean = places.mean[rows].to(place.dtype).lerp_(gradient, 1 - betas[0])
        square = places.square[rows].to(place.dtype).mul_(betas[1])
        if square.shape == gradient.shape:
            square.addcmul_(gradient, gradient, value=1 - betas[1])
        else:
            square.add_(gradient.square().mean(1, keepdim=True), alpha=1 - betas[1])
        places.mean[rows], places.square[rows] = mean, square
        step = (square / unbiased).sqrt_().add_(places.tiny).reciprocal_() * mean * pace
        place.sub_(step).clamp_(places.low - places.box, places.high + places.box)


def dequantize_places(places: Places, scale: Tensor, zero: Tensor | int, out: Tensor) -> None:
    """Writes scale*(value - zero) to `out` (groups, G), in fp32, rounded once.

    scale (groups,) fp32 or fp64; zero (groups,) uint8, or one number for all.
    """
    for rows in parts(out):
        # In fp32 whatever the model is in: the bits of a stored weight's `dequantize`.
        values = (places.values(rows) - _of(zero, rows)).float()
        out[rows] = values.mul_(scale[rows].float().unsqueeze(1))


def add_place_gradient(
    gradient: Tensor, places: Places, rows: slice, zero: Tensor | int, sign: Tensor, out: Tensor
) -> None:
    """Adds the sum over each of some groups of gradient*(value - zero) to `out`, and gradient*sign to what codes had.

    gradient  D of these groups, (count, G), which is lost
    zero      of these groups, (count,) uint8, or one number for all
    sign      of these groups' scales, (count,)
    out       (count,), fp32 or fp64
    """
    for part in parts(gradient):
        values = places.values(slice(rows.start + part.start, min(rows.start + part.stop, rows.stop)))
        steps = values.to(out.dtype).sub_(_of(zero, part))
        out[part] += steps.mul_(gradient[part]).sum(-1)
    places.gradient[rows] += gradient.mul_(sign.unsqueeze(1).to(gradient.dtype))


def parts(groups: Tensor) -> Iterator[slice]:
    """Slices of (groups, G), so that intermediate tensors stay small."""
    size = max(1, (CHUNK_ELEMENTS if groups.is_cuda else CACHED_ELEMENTS) // groups.shape[1])
    return (slice(start, start + size) for start in range(0, len(groups), size))


def _of(zero: Tensor | int, rows: slice) -> Tensor | int:
    return zero if isinstance(zero, int) else zero[rows].unsqueeze(1)
