"""Inputs of linears as a server rounds them before the product, for the schemes that say so.

With a the largest magnitude of a token's inputs, of so many consecutive ones, or of the calibration text, and M the
largest value of the element:

    FP8, INT8       s = a / M, in fp32 (M = 448, or 127);  x_hat = s * E(x / s)
    MXFP4, MXFP8    s = 2^e of groups of 32, e by the rule of weights (`workers.numerics.floats.float_grids.exponents`)
    NVFP4           G = 448 * 6 / a of the calibration text;  s = e4m3(G * a_group / 6) / G, groups of 16

vLLM 0.33 computes them so (per token, per token and group, or static), and compressed-tensors 0.20 but for INT8, where
it divides by 127.5. Nothing here waits for a device, so that steps with it can be captured.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, Activations, Element, ScaleType
from workers.numerics.floats.elements import LARGEST, rounded
from workers.numerics.floats.float_grids import E2M1_MAX, E4M3_MAX, SMALLEST_E4M3, exponents, global_scale_of

INT8_MAX = 127
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class InputRounding:
    """The rounding of one linear's inputs.

    amax   fp32 (1,): largest magnitude in calibration text, where the scheme is `calibrated`
    """

    scheme: Scheme
    activations: Activations
    amax: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """x_hat of inputs (..., in), in their dtype."""
        about, columns = self.activations, x.shape[-1]
        if about.every_token:
            return _on_grid(x.float(), self._calibrated() / _largest(about), about.element).to(x.dtype)
        width = columns if about.columns == WHOLE else about.columns
        wide = nn.functional.pad(x.float(), (0, -columns % width))
        groups = wide.view(*wide.shape[:-1], -1, width)
        scale = self._scales(groups.abs().amax(-1, keepdim=True))
        return _on_grid(groups, scale, about.element).flatten(-2)[..., :columns].to(x.dtype)

    def _scales(self, amax: Tensor) -> Tensor:
        about = self.activations
        if about.scale is ScaleType.E8M0:
            return torch.exp2(exponents(amax, about.element).float() - 127)
        if about.scale is ScaleType.E4M3:
            divisor = global_scale_of(self._calibrated())
            stored = (amax / E2M1_MAX * divisor).clamp(SMALLEST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn)
            return stored.float() / divisor
        return (amax / _largest(about)).clamp(min=SMALLEST_SCALE)

    def _calibrated(self) -> Tensor:
        if self.amax is None:
            raise ValueError(f"{self.scheme.name} rounds inputs by a number from calibration text, and there is none")
        return self.amax


def _largest(about: Activations) -> float:
    return INT8_MAX if about.element is Element.INTEGER else LARGEST[about.element]


def _on_grid(x: Tensor, scale: Tensor, element: Element) -> Tensor:
    in_steps = x / scale
    if element is Element.INTEGER:
        return in_steps.round_().clamp_(-INT8_MAX - 1, INT8_MAX) * scale
    return rounded(in_steps, element) * scale


def input_roundings(schemes: Mapping[str, Scheme], amax: Mapping[str, Tensor]) -> dict[str, InputRounding]:
    """The rounding of every linear whose scheme has one; `amax` of those that are calibrated, fp32 (1,)."""
    return {
        name: InputRounding(scheme, scheme.row.activations, amax.get(name) if scheme.row.calibrated else None)
        for name, scheme in schemes.items()
        if scheme.row is not None and scheme.row.activations is not None
    }


class _Rounded:
    """Rounds what several linears get one after another (queries, keys, values) once."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, InputRounding, Tensor] | None = None

    def __call__(self, rounding: InputRounding, x: Tensor) -> Tensor:
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version and _alike(last[2], rounding):
            return last[3]
        x_hat = rounding(x)
        self._last = (x, x._version, rounding, x_hat)
        return x_hat


def _alike(one: InputRounding, other: InputRounding) -> bool:
    return one.scheme == other.scheme and one.amax is other.amax


@contextmanager
def rounding_inputs(linears: Mapping[str, nn.Module], roundings: Mapping[str, InputRounding]) -> Iterator[None]:
    """The linears of these names compute with rounded inputs while the context lasts."""
    shared = _Rounded()

    def hook(rounding: InputRounding) -> Any:
        return lambda _, arguments: (shared(rounding, arguments[0]), *arguments[1:])

    with ExitStack() as stack:
        for name, rounding in roundings.items():
            stack.callback(linears[name].register_forward_pre_hook(hook(rounding)).remove)
        yield
