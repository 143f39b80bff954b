"""The native format: the common representation as safetensors, and a one-file loader beside it.

For a linear `name` of shape (out, in), with b bits (2 to 8) and groups of g inputs:

    name.codes       uint8 (out, ceil(in * b / 8))         dense along the inputs, lowest bit first
    name.scale       fp16, bf16 or fp32 (out, in / g)      of either sign
    name.zero_point  uint8 (ceil(out * (in / g) * b / 8))  dense, row after row; asymmetric only
    name.shape       int64 (2)                             (out, in)

`bitwright.json` says the scheme of every quantized linear and the dtype of its dequantized weight. Nothing is rounded:
codes and scales are those that the method made, and other formats are made from them later. The weight files are not
called model.safetensors, so that `from_pretrained` says that it finds no weights rather than fill them at random.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from app.domain.errors import CorruptCheckpoint
from app.domain.methods import Scheme
from workers.numerics.packing import pack_bytes, packed_bytes, unpack_bytes
from workers.numerics.quantized import AffineWeight

VERSION = 1
LOADER = Path(__file__).with_name("load_bitwright.py")
"""Copied into every native checkpoint."""


def compress(name: str, weight: AffineWeight) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name."""
    bits = weight.scheme.bits
    tensors = {
        f"{name}.codes": pack_bytes(weight.codes, bits),
        f"{name}.scale": weight.scale.contiguous(),
        f"{name}.shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[f"{name}.zero_point"] = pack_bytes(weight.zero_point.reshape(1, -1), bits).flatten()
    return tensors


def decompress(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> AffineWeight:
    """The exact inverse of `compress`.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    try:
        packed, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        out_features, in_features = (int(n) for n in tensors[f"{name}.shape"])
        zero = None if scheme.symmetric else tensors[f"{name}.zero_point"]
    except KeyError as missing:
        raise CorruptCheckpoint(f"tensor {missing} is missing", field=name) from missing
    fits = packed.shape == (out_features, packed_bytes(in_features, scheme.bits)) and scale.shape[0] == out_features
    if not fits or (zero is not None and len(zero) != packed_bytes(scale.numel(), scheme.bits)):
        raise CorruptCheckpoint(f"tensors of {name} do not fit its shape ({out_features}, {in_features})", field=name)
    codes = unpack_bytes(packed, scheme.bits, in_features)
    if zero is not None:
        zero = unpack_bytes(zero.unsqueeze(0), scheme.bits, scale.numel()).view_as(scale)
    return AffineWeight(codes, scale, zero, scheme, dtype)


def describe(schemes: Mapping[str, Scheme], dtypes: Mapping[str, torch.dtype]) -> dict[str, object]:
    """The content of `bitwright.json`: scheme and dtype of every quantized linear by its name in the checkpoint."""
    return {
        "format": "bitwright",
        "version": VERSION,
        "linears": {
            name: {**scheme.model_dump(), "dtype": str(dtypes[name]).removeprefix("torch.")}
            for name, scheme in schemes.items()
        },
    }
