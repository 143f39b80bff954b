"""MLX's modes of quantized weights, as mlx-lm saves and reads them.

    name.weight   uint32 (out, in * b / 32)       codes, dense along the inputs, lowest bits first
    name.scales   the model's dtype (out, in / g)
    name.biases   the same                        -scale * zero_point, or the group's fractional offset

    W_hat = scales * codes + biases

    mxfp4, mxfp8: name.weight as above, of 4 or 8 bits, and name.scales uint8 (out, in / 32): exponents plus 127

b is 2, 3, 4, 5, 6 or 8 and g is 32, 64 or 128. A bias of a symmetric weight is scale * 2^(b-1), which is exact; one of
another zero point is rounded to the model's dtype once, as a fractional offset is, and the distance that this moves
weights is told. MLX computes in the dtype of its inputs: it rounds the product before it adds the bias.

config.json has `quantization`: the most usual scheme, and those of linears that differ by their names. Read in mlx-lm
0.32.2 (`utils.py`, `load_model`), which sees what is not quantized by the scales that are not there.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.methods import Form, Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.packed.loading import LOADER, base_of, sections
from workers.formats.packed.words import affine_alone, parts_of
from workers.formats.stored_linear import StoredLinear
from workers.numerics.packing import pack_words, unpack_words
from workers.numerics.quantized import AffineWeight, FloatWeight, LinearResult

MODES = {SchemeName.MXFP4A16: "mxfp4", SchemeName.MXFP8A16: "mxfp8"}


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        FormatCannotHold: another form or scheme, or a scale of another dtype than the model's.
    """
    if isinstance(result.weight, FloatWeight):
        return _float_parts(name, result)
    weight = affine_alone(name, result, ExportFormat.MLX, result.weight.dtype)
    return {
        f"{name}.weight": pack_words(weight.codes, weight.scheme.bits).view(torch.uint32),
        f"{name}.scales": weight.scale.contiguous(),
        f"{name}.biases": _biases(name, weight),
    }


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The inverse of `compress`: whole zero points are found again, since a bias is off by less than half a scale.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    (words, scales), scheme = parts_of(name, tensors, "weight", "scales"), stored.scheme
    biases = scales if stored.form is Form.FLOAT else parts_of(name, tensors, "biases")[0]
    columns = words.shape[1] * 32 // scheme.bits
    if scales.shape != biases.shape or scales.shape != (len(words), columns // scheme.width(columns)):
        raise CorruptCheckpoint(f"tensors of {name} do not fit each other", field=name)
    codes = unpack_words(words.view(torch.int32), scheme.bits, columns)
    if stored.form is Form.FLOAT:
        return LinearResult(FloatWeight(codes, scales, scheme, stored.torch_dtype))
    zero = offset = None
    if stored.offset:
        offset = biases
    elif not scheme.symmetric:
        zero = (-biases.float() / scales.float()).round().to(torch.uint8)
    return LinearResult(AffineWeight(codes, scales, zero, scheme, stored.torch_dtype, offset))


def held(name: str, weight: AffineWeight) -> AffineWeight:
    """The weight with the numbers that `compress` stores of it: a bias in place of a zero point.

    Raises:
        FormatCannotHold: a bias is beyond what the model's dtype holds.
    """
    if weight.scheme.symmetric:
        return weight
    return replace(weight, zero_point=None, offset=_biases(name, weight))


def moved(name: str, result: LinearResult) -> float:
    """The most by which rounding a bias moves a group's weights, in steps of its scale."""
    weight = result.weight
    if not isinstance(weight, AffineWeight) or weight.scheme.symmetric:
        return 0.0
    exact = _exact(weight)
    return float(((_biases(name, weight).float() - exact).abs() / weight.scale.float().abs()).nan_to_num(0.0).max())


def config(schemes: Mapping[str, Scheme], _ignored: Collection[str]) -> dict[str, object]:
    """The `quantization` of config.json; `schemes` of every quantized linear by module name."""
    usual = Counter(schemes.values()).most_common(1)[0][0]
    others = {name: _settings(scheme) for name, scheme in schemes.items() if scheme != usual}
    return {**_settings(usual), **others}


def _settings(scheme: Scheme) -> dict[str, object]:
    mode = "affine" if scheme.name is None else MODES[scheme.name]
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode}


def _float_parts(name: str, result: LinearResult) -> dict[str, Tensor]:
    """Tensors of a weight in one of the floating-point modes."""
    weight = result.weight
    if not isinstance(weight, FloatWeight) or weight.scheme.name not in MODES or result.low_rank is not None:
        hint = 'ask for formats: ["native"] or ["merged"]'
        raise FormatCannotHold(f"mlx holds no weights of {weight.scheme.name}", field=name, hint=hint)
    words = pack_words(weight.codes, weight.scheme.bits).view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": weight.scale.contiguous()}


def _biases(name: str, weight: AffineWeight) -> Tensor:
    """In the model's dtype, (out, groups)."""
    biases = _exact(weight).to(weight.dtype)
    if not torch.isfinite(biases).all():
        hint = 'ask for formats: ["compressed-tensors"] or ["native"]'
        raise FormatCannotHold(f"a bias is beyond what {weight.dtype} holds", field=name, hint=hint)
    return biases


def _exact(weight: AffineWeight) -> Tensor:
    """Biases before they are rounded, fp32 (out, groups)."""
    if weight.offset is not None:
        return weight.offset.float()
    middle = 2.0 ** (weight.scheme.bits - 1)
    return -weight.scale.float() * (middle if weight.zero_point is None else weight.zero_point.float())


FORMAT = replace(
    checkpoint_format(
        Layout(
            compress,
            config=lambda targets, ignored: {"quantization": config(targets, ignored)},
            needs_loader=lambda _schemes: True,
            moved=moved,
            loader=LOADER,
        ),
        sections(ExportFormat.MLX),
        base_of(ExportFormat.MLX),
        decompress,
    ),
    held=held,
)
