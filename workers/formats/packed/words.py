"""Words of GPTQModel and AutoAWQ: int32, scales in fp16, both transposed, with a group's numbers along the outputs.

    name.qweight   GPTQ: int32 (in * b / 32, out)    codes of an output, dense along the inputs, lowest bits first
                   AWQ:  int32 (in, out / 8)         eight outputs a word, from the lowest bits 0, 2, 4, 6, 1, 3, 5, 7
    name.qzeros    int32 (in / g, out * b / 32)      zero points along the outputs, in the order of the codes
    name.scales    fp16 (in / g, out)                of either sign

    W_hat = scales * (codes - zeros)

Read in GPTQModel 7.7 (`nn_modules/qlinear`) and vLLM 0.32 (`auto_gptq.py`, `auto_awq.py`). A symmetric weight's zero
point is 2^(b-1), and stands in the file like any other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import AffineWeight, LinearResult

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output at each place of a word of AWQ, from the lowest bits."""
IN_A_WORD = len(AWQ_ORDER)


def affine_alone(name: str, result: LinearResult, export_format: ExportFormat, scale: torch.dtype) -> AffineWeight:
    """The weight of the linear `name`, if it is one that such a format holds.

    scale   the dtype of its scales

    Raises:
        FormatCannotHold: another form or scheme, or a scale that would have to be rounded.
    """
    weight, title = result.weight, export_format.value
    if not isinstance(weight, AffineWeight) or result.low_rank is not None:
        raise FormatCannotHold(
            f"{title} holds affine weights, without low-rank factors",
            field=name,
            hint='ask for formats: ["merged"], or add "peft" for the low-rank factors',
        )
    if not export_format.info.holds(weight.scheme):
        hint = "see GET /v1/formats for what it holds, or ask for native"
        raise FormatCannotHold(f"{title} does not hold {weight.scheme}", field=name, hint=hint)
    if weight.shape[0] % export_format.info.output_multiple or weight.shape[1] % export_format.info.group_multiple:
        detail = f"{title} packs words, which a weight of the shape {weight.shape} does not fill"
        raise FormatCannotHold(detail, field=name, value=weight.shape, hint="add it to modules.ignore")
    if weight.scale.dtype != scale:
        raise FormatCannotHold(
            f"{title} stores scales as {scale}; these are {weight.scale.dtype}, and rounding them would change the "
            "weights",
            field=name,
            value=str(weight.scale.dtype),
            hint="quantize again with this format among the job's formats",
        )
    return weight


def whole_zeros(name: str, weight: AffineWeight, export_format: ExportFormat) -> Tensor:
    """Zero points, uint8 (out, groups), those of a symmetric weight among them.

    Raises:
        FormatCannotHold: the weight has fractional offsets.
    """
    if weight.offset is not None:
        raise FormatCannotHold(
            f"{export_format.value} holds whole zero points, and this weight has a fractional offset for each group",
            field=name,
            hint='merge with round_offset, or ask for formats: ["mlx"] or ["native"]',
        )
    if weight.zero_point is not None:
        return weight.zero_point
    return torch.full(weight.scale.shape, 2 ** (weight.scheme.bits - 1), dtype=torch.uint8)


def affine_weight(name: str, codes: Tensor, zeros: Tensor, scales: Tensor, stored: StoredLinear) -> LinearResult:
    """The result of unpacked tensors.

    codes    uint8 (out, in)
    zeros    uint8 (out, groups)
    scales   fp16 (groups, out)

    Raises:
        CorruptCheckpoint: shapes do not fit together, or a symmetric weight has another zero point than its own.
    """
    scheme = stored.scheme
    if scales.T.shape != zeros.shape or codes.shape != (len(zeros), zeros.shape[1] * scheme.width(codes.shape[1])):
        raise CorruptCheckpoint(f"tensors of {name} do not fit each other", field=name)
    if scheme.symmetric and not bool((zeros == 2 ** (scheme.bits - 1)).all()):
        raise CorruptCheckpoint(f"{name} is symmetric, and has zero points of its own", field=name)
    zero = None if scheme.symmetric else zeros.contiguous()
    return LinearResult(AffineWeight(codes, scales.T.contiguous(), zero, scheme, stored.torch_dtype))


def parts_of(name: str, tensors: Mapping[str, Tensor], *suffixes: str) -> tuple[Tensor, ...]:
    """Tensors of the linear `name` by their last names.

    Raises:
        CorruptCheckpoint: one is missing.
    """
    try:
        return tuple(tensors[f"{name}.{suffix}"] for suffix in suffixes)
    except KeyError as missing:
        raise CorruptCheckpoint(f"tensor {missing} is missing", field=name) from missing
