"""Tensors of a linear in the format of compressed-tensors, which transformers and vLLM load.

For a linear `name` of shape (out, in), by the `format` of its group in config.json:

  pack-quantized: integers of b bits, groups of g inputs
    name.weight_packed      int32 (out, ceil(in * b / 32))       unsigned codes, dense along the inputs
    name.weight_scale       model dtype (out, in / g)            of either sign
    name.weight_zero_point  int32 (ceil(out * b / 32), in / g)   dense along the outputs; asymmetric only
    name.weight_shape       int64 (2)                            (out, in)
  int-quantized: int8
    name.weight             int8 (out, in)
    name.weight_scale       model dtype (out, 1)                 of either sign
  float-quantized, naive-quantized: fp8, fp8-tensor, fp8-block; fp8a16
    name.weight             e4m3 (out, in)
    name.weight_scale       model dtype (out, 1), (1) or (ceil(out / 128), ceil(in / 128))
    name.input_scale        fp32 (1)                             of fp8-tensor: amax of the inputs / 448
  nvfp4-pack-quantized: nvfp4, nvfp4a16
    name.weight_packed      uint8 (out, in / 2)                  the first of two codes in the low bits
    name.weight_scale       e4m3 (out, in / 16)                  of the true scale times the next
    name.weight_global_scale  fp32 (1)                           a divisor
    name.input_global_scale   fp32 (1)                           of nvfp4: 448 * 6 / amax of the inputs
  mxfp4-pack-quantized: mxfp4, mxfp4a16
    name.weight_packed      uint8 (out, in / 2)
    name.weight_scale       uint8 (out, in / 32)                 exponents plus 127
  mxfp8-quantized: mxfp8, mxfp8a16
    name.weight             e4m3 (out, in)
    name.weight_scale       uint8 (out, in / 32)

compressed-tensors defines signed int8 codes and stores packed ones plus 2^(b-1), which equals our unsigned codes; the
same holds for its zero points. It multiplies in the scale's dtype. Since codes and zero points are exact in bf16 and
fp16, that is one rounding of the exact product, as in `AffineWeight.dequantize`, if and only if the scale has the
weight's dtype; and so it is with FP8. Read in compressed-tensors 0.20 (`compressors/`, `quantization/lifecycle/`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from app.domain.methods import Form, Scheme, SchemeName
from app.domain.methods.named_schemes import WHOLE, Element, ScaleType
from bitwright.errors import CorruptCheckpoint
from workers.formats.compressed_tensors.refusals import held
from workers.formats.stored_linear import StoredLinear
from workers.numerics.floats.float_grids import global_scale_of
from workers.numerics.packing import pack_bytes, pack_words, unpack_bytes, unpack_words
from workers.numerics.quantized import AffineWeight, FloatWeight, LinearResult

E4M3_MAX, E2M1_MAX = 448.0, 6.0
MIDDLE = 128
"""Of the unsigned codes of 8 bits: int8's zero."""
FORMATS: Mapping[SchemeName, str] = {
    SchemeName.FP8: "float-quantized",
    SchemeName.FP8_TENSOR: "float-quantized",
    SchemeName.FP8_BLOCK: "float-quantized",
    SchemeName.FP8A16: "naive-quantized",
    SchemeName.INT8: "int-quantized",
    SchemeName.NVFP4: "nvfp4-pack-quantized",
    SchemeName.NVFP4A16: "nvfp4-pack-quantized",
    SchemeName.MXFP4: "mxfp4-pack-quantized",
    SchemeName.MXFP4A16: "mxfp4-pack-quantized",
    SchemeName.MXFP8: "mxfp8-quantized",
    SchemeName.MXFP8A16: "mxfp8-quantized",
}


def format_of_scheme(scheme: Scheme) -> str:
    """The `format` of a scheme's group."""
    return "pack-quantized" if scheme.name is None else FORMATS[scheme.name]


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        FormatCannotHold: another form than an affine or floating-point weight alone, a scale that it would have to
            round, or a number that no runtime reads as it is meant.
    """
    weight = held(name, result)
    if isinstance(weight, FloatWeight):
        parts = _float_parts(weight)
    else:
        parts = _packed_parts(weight) if weight.scheme.name is None else _int8_parts(weight)
    return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`; of the inputs' largest magnitude, 16 significant bits come back.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    parts, scheme = _Parts(name, tensors), stored.scheme
    if scheme.name is None:
        return LinearResult(_packed_weight(parts, stored))
    return LinearResult(_float_weight(parts, stored) if scheme.form is Form.FLOAT else _int8_weight(parts, stored))


class _Parts:
    """The tensors of one linear by their last name."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._name, self._tensors = name, tensors

    def __getitem__(self, suffix: str) -> Tensor:
        try:
            return self._tensors[f"{self._name}.{suffix}"]
        except KeyError as missing:
            raise CorruptCheckpoint(f"tensor {missing} is missing", field=self._name) from missing

    def one(self, suffix: str) -> Tensor:
        """A tensor of one number, fp32 (1,)."""
        tensor = self[suffix]
        if tensor.shape != (1,) or tensor.dtype != torch.float32:
            raise CorruptCheckpoint(f"{self._name}.{suffix} is no single number of fp32", field=self._name)
        return tensor

    def misfit(self, out_features: int, in_features: int) -> CorruptCheckpoint:
        detail = f"tensors of {self._name} do not fit its shape ({out_features}, {in_features})"
        return CorruptCheckpoint(detail, field=self._name)


def _packed_parts(weight: AffineWeight) -> dict[str, Tensor]:
    bits = weight.scheme.bits
    parts = {
        "weight_packed": pack_words(weight.codes, bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        parts["weight_zero_point"] = pack_words(weight.zero_point.T.contiguous(), bits).T.contiguous()
    return parts


def _packed_weight(parts: _Parts, stored: StoredLinear) -> AffineWeight:
    scheme = stored.scheme
    out_features, in_features = (int(n) for n in parts["weight_shape"])
    scale, packed = parts["weight_scale"], parts["weight_packed"]
    zero = None if scheme.symmetric else parts["weight_zero_point"]
    fits = packed.shape == (out_features, _words(in_features, scheme.bits)) and scale.shape[0] == out_features
    if not fits or (zero is not None and zero.shape != (_words(out_features, scheme.bits), scale.shape[1])):
        raise parts.misfit(out_features, in_features)
    codes = unpack_words(packed, scheme.bits, in_features)
    if zero is not None:
        zero = unpack_words(zero.T.contiguous(), scheme.bits, out_features).T.contiguous()
    return AffineWeight(codes, scale, zero, scheme, stored.torch_dtype)


def _int8_parts(weight: AffineWeight) -> dict[str, Tensor]:
    return {"weight": (weight.codes ^ MIDDLE).view(torch.int8), "weight_scale": weight.scale.contiguous()}


def _int8_weight(parts: _Parts, stored: StoredLinear) -> AffineWeight:
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype != torch.int8 or weight.ndim != 2 or scale.shape != (len(weight), 1):
        raise parts.misfit(*_matrix(weight))
    return AffineWeight(weight.view(torch.uint8) ^ MIDDLE, scale, None, stored.scheme, stored.torch_dtype)


def _float_parts(weight: FloatWeight) -> dict[str, Tensor]:
    row = weight.scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    scale = weight.scale.contiguous()
    parts = {"weight_scale": scale.view(1) if row.rows == WHOLE else scale}
    if row.element is Element.E2M1:
        parts["weight_packed"] = pack_bytes(weight.codes, 4)
    else:
        parts["weight"] = weight.codes.contiguous().view(torch.float8_e4m3fn)
    if weight.global_scale is not None:
        # One number of linears that a runtime joins, and safetensors refuses tensors that share memory.
        parts["weight_global_scale"] = weight.global_scale.clone()
    if weight.input_amax is not None and row.element is Element.E2M1:
        parts["input_global_scale"] = global_scale_of(weight.input_amax)
    elif weight.input_amax is not None:
        parts["input_scale"] = weight.input_amax.float() / E4M3_MAX
    return parts


def _float_weight(parts: _Parts, stored: StoredLinear) -> FloatWeight:
    scheme, scale = stored.scheme, parts["weight_scale"]
    row = scheme.row
    assert row is not None  # noqa: S101 - for the type checker
    packs = row.element is Element.E2M1
    codes = parts["weight_packed" if packs else "weight"]
    rows, columns = _matrix(codes)
    if packs:
        columns *= 2
    right = codes.dtype == (torch.uint8 if packs else torch.float8_e4m3fn) and codes.ndim == 2
    bands = -(-rows // row.rows) if row.rows != WHOLE else 1
    groups = (1,) if row.rows == WHOLE else (bands, scheme.groups(columns) if columns else 0)
    if not right or scale.shape != groups:
        raise parts.misfit(rows, columns)
    divisor = parts.one("weight_global_scale") if row.scale is ScaleType.E4M3 else None
    amax = None
    if stored.input_amax:
        amax = E4M3_MAX * E2M1_MAX / parts.one("input_global_scale") if packs else parts.one("input_scale") * E4M3_MAX
        amax = _short(amax)
    codes = unpack_bytes(codes, 4, columns) if packs else codes.view(torch.uint8)
    return FloatWeight(codes, scale.view(bands, -1), scheme, stored.torch_dtype, divisor, amax)


def _short(number: Tensor) -> Tensor:
    """The nearest number of 16 significant bits: activations in 16 bits have no more, and a quotient loses the 24th."""
    mantissa, exponent = torch.frexp(number)
    return torch.ldexp((mantissa * 65536).round() / 65536, exponent)


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (tensor.numel(), 0)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
