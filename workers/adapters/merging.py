"""Fold an aligned adapter into the offsets of a quantized weight, and prove it: codes and scales stay as they are.

A group's weights are w = sc*(q - z), or w = sc*q + beta. An adapter whose update is one number Delta per group of
a row (`GroupedAdapter.group_delta`) only moves the offset:

    beta' = beta + Delta        beta = -sc*z of an integer zero point, -sc*2^(b-1) of a symmetric weight

so w' = w + Delta exactly, with the same codes and scales. (QA-LoRA, arXiv:2309.14717, section 3.3, and its code move z
by Delta/sc, which is right for one of the two conventions alone; the offset needs neither division nor convention.)

What is not exact, and is measured: beta' is stored in `offset_dtype`, and weights are rounded to their own dtype when
they are dequantized. Where a runtime wants integer zero points, z' = clamp(round(-beta'/sc), 0, 2^b - 1) moves a
group's weights by up to half a step, and more where it is clamped: only on request (`round_offset`), and with its
error.

A weight on a codebook has no offset and is refused; so is an update that varies within a group (`group_delta`). Nothing
is dropped silently.
"""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from bitwright.errors import NumericalFailure, OffsetNotRepresentable
from workers.numerics.quantized import AffineWeight, QuantizedWeight


@dataclass(frozen=True)
class MergeProof:
    """Evidence that a merge equals the adapter, and its error as shipped; errors are the largest of a linear.

    codes_before, codes_after, scales_before, scales_after    SHA-256 of the tensors' bytes
    error_exact     |(sc*q + beta + Delta) - (W + Delta)| in fp64: of the algebra alone
    error_stored    |W' - (W + Delta)| in fp64 with beta' (or z') as stored
    error_shipped   the same of the dequantized weight, in its dtype
    bound           limit of `error_shipped` unless zero points are rounded: half an ulp of the largest offset
                    and of the largest weight, and fp32's in their sum
    rounded         whether zero points are integers
    """

    codes_before: str
    codes_after: str
    scales_before: str
    scales_after: str
    error_exact: float
    error_stored: float
    error_shipped: float
    bound: float
    rounded: bool

    @property
    def codes_and_scales_kept(self) -> bool:
        return (self.codes_before, self.scales_before) == (self.codes_after, self.scales_after)


@dataclass(frozen=True)
class Merged:
    """A weight with an adapter in it, and the proof."""

    weight: AffineWeight
    proof: MergeProof


@torch.no_grad()
def fold(
    weight: QuantizedWeight,
    delta: Tensor,
    *,
    name: str = "",
    offset_dtype: torch.dtype = torch.float32,
    round_offset: bool = False,
) -> Merged:
    """The weight with an update that is one number per group, (out, groups), in fp64; arguments as in `folded`.

    Raises:
        OffsetNotRepresentable: the weight lies on a codebook, or an offset does not fit `offset_dtype`.
        NumericalFailure: the update is not finite.
    """
    merged = folded(weight, delta, name=name, offset_dtype=offset_dtype, round_offset=round_offset)
    assert isinstance(weight, AffineWeight)  # noqa: S101 - for the type checker; other weights were refused
    return Merged(merged, _prove(weight, merged, delta.double()))


@torch.no_grad()
def folded(
    weight: QuantizedWeight,
    delta: Tensor,
    *,
    name: str = "",
    offset_dtype: torch.dtype = torch.float32,
    round_offset: bool = False,
) -> AffineWeight:
    """The weight of `fold` without its proof, which costs several passes over the dense weight.

    name           of the linear, for messages
    offset_dtype   in which offsets are stored
    round_offset   to integer zero points instead

    Raises:
        OffsetNotRepresentable: the weight lies on a codebook, or an offset does not fit `offset_dtype`.
        NumericalFailure: the update is not finite.
    """
    if not isinstance(weight, AffineWeight):
        raise OffsetNotRepresentable(
            "a weight on a codebook has no offset that an adapter could be folded into",
            field=name or "merge",
            hint='merge in 16 bits (merge: "16bit"), or quantize the base with a method that makes affine weights',
        )
    if not torch.isfinite(delta).all():
        raise NumericalFailure(
            f"what was trained on {name or 'a linear'} is not finite: it cannot be folded into offsets",
            field="finetune.learning_rate",
            hint="use a lower learning rate, or more bits",
        )
    wanted = offsets(weight) + delta.double()
    return with_zero_points(weight, wanted) if round_offset else _with_offsets(weight, wanted, offset_dtype, name)


def offsets(weight: AffineWeight) -> Tensor:
    """beta of each group, fp64 (out, groups), however it is stored."""
    if weight.offset is not None:
        return weight.offset.double()
    zero = 2.0 ** (weight.scheme.bits - 1) if weight.zero_point is None else weight.zero_point.double()
    return -weight.scale.double() * zero


def exact_weight(weight: AffineWeight) -> Tensor:
    """The weight of the stored numbers before any rounding, fp64 (out, in)."""
    codes, scale = (
        weight.codes.double().view(len(weight.codes), -1, weight.group_size),
        weight.scale.double().unsqueeze(-1),
    )
    if weight.offset is not None:
        return (scale * codes + weight.offset.double().unsqueeze(-1)).flatten(1)
    middle = 2.0 ** (weight.scheme.bits - 1)
    zero = middle if weight.zero_point is None else weight.zero_point.double().unsqueeze(-1)
    return (scale * (codes - zero)).flatten(1)


def with_zero_points(weight: AffineWeight, wanted: Tensor) -> AffineWeight:
    """The weight with the integer zero points that come nearest to offsets `wanted`, (out, groups)."""
    top = 2**weight.scheme.bits - 1
    zero = (-wanted / weight.scale.double()).round().clamp(0, top).to(torch.uint8)
    scheme = weight.scheme.model_copy(update={"symmetric": False})
    return AffineWeight(weight.codes, weight.scale, zero, scheme, weight.dtype)


def _with_offsets(weight: AffineWeight, wanted: Tensor, dtype: torch.dtype, name: str) -> AffineWeight:
    stored = wanted.to(dtype)
    if not torch.isfinite(stored).all():
        raise OffsetNotRepresentable(
            f"an offset of {float(wanted.abs().max()):.3g} is beyond what {dtype} holds",
            field=name or "merge",
            hint="leave gguf out of formats: native holds offsets in float32; or merge to 16 bits",
        )
    scheme = weight.scheme.model_copy(update={"symmetric": False})
    return AffineWeight(weight.codes, weight.scale, None, scheme, weight.dtype, stored)


def _prove(before: AffineWeight, after: AffineWeight, delta: Tensor) -> MergeProof:
    spread = delta.repeat_interleave(before.group_size, 1)
    exact = exact_weight(before) + spread
    moved = offsets(before) + delta
    codes = before.codes.double().view(len(before.codes), -1, before.group_size)
    algebra = (before.scale.double().unsqueeze(-1) * codes + moved.unsqueeze(-1)).flatten(1)
    return MergeProof(
        codes_before=_digest(before.codes),
        codes_after=_digest(after.codes),
        scales_before=_digest(before.scale),
        scales_after=_digest(after.scale),
        error_exact=float((algebra - exact).abs().max()),
        error_stored=float((exact_weight(after) - exact).abs().max()),
        error_shipped=float((after.dequantize().double() - exact).abs().max()),
        bound=_bound(after, moved, exact),
        rounded=after.zero_point is not None,
    )


def _bound(after: AffineWeight, offset: Tensor, exact: Tensor) -> float:
    """Error bound for a single rounding of the offset, of fp32's product and sum, and of the weight."""
    stored = 0.0 if after.offset is None else torch.finfo(after.offset.dtype).eps / 2
    span = float((after.scale.double().abs() * (2**after.scheme.bits - 1)).max() + offset.abs().max())
    largest = float(exact.abs().max())
    single, half = torch.finfo(torch.float32).eps, torch.finfo(after.dtype).eps / 2
    return stored * float(offset.abs().max()) + single * span + half * largest * (1 + 1e-3)


def _digest(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
