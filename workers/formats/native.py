"""The native format: the common representation as safetensors, and a one-file loader beside it.

For a linear `name` of shape (out, in), with b bits (2 to 8) and groups of g inputs:

    name.codes          uint8 (out, ceil(in * b / 8))         dense along the inputs, lowest bit first
    name.shape          int64 (2)                             (out, in)
  affine
    name.scale          fp16, bf16 or fp32 (out, in / g)      of either sign
    name.zero_point     uint8 (ceil(out * (in / g) * b / 8))  dense, row after row; asymmetric without an offset
    name.offset         floating point (out, in / g)          in place of a zero point
  codebook
    name.codebook       fp32 (2^b)
    name.absmax         fp16, bf16 or fp32 (out, in / g); or, with a second level of b1 bits for B1 groups:
    name.absmax_codes   uint8 (ceil(out * (in / g) * b1 / 8))  dense, row after row
    name.absmax_scale   fp16, bf16 or fp32 (ceil(out * (in / g) / B1))
    name.absmax_offset  fp32 ()
  float (FP8, FP4)
    name.scale          (bands, ceil(in / g)): floating point, e4m3 beside a global scale, or uint8 exponents plus 127
    name.global_scale   fp32 (1): true scales are the stored ones divided by it
    name.input_amax     fp32 (1): largest magnitude of the inputs in calibration text
  blocks (llama.cpp's types: blocks of B weights, sub-blocks of g)
    name.codes          of the bits that hold each by itself, where a file has several together
    name.scale          fp16 (out, in / B)
    name.scale_codes    uint8 (ceil(out * (in / g) * b1 / 8)) dense, row after row; where sub-blocks have their own
    name.minimum        fp16 (out, in / B)                    where there is an offset
    name.minimum_codes  uint8, as scale_codes
  with a low-rank correction
    name.lora_a         floating point (rank, in)
    name.lora_b         the same dtype (out, rank)

and for an attention whose key-value cache is to be in FP8

    attention.k_scale, attention.v_scale    fp32 (1): `workers.contracts.kv_cache`

`bitwright.json` describes every quantized linear (`StoredLinear`), and where in a larger tensor of the original it
belongs (`StoredPart`): experts of one tensor are stored one by one. Nothing is rounded: codes and scales are those of
the method, and other formats are written from them later. The weight files are not called model.safetensors, so that
`from_pretrained` says that it finds no weights rather than fill them at random.

Where a GGUF file can be made of the result, `inputs.safetensors` has what its importance matrix is made of:

    name.in_sum2        fp32 (in)                             sum over calibration tokens of x_j^2, of the original
    name.counts         int64 (1)                             number of tokens

The loader returns a model whose weights have the corrections in them (`LinearResult.dequantize`), as the
engine evaluated them; or, on request, the quantized base alone, for the adapter of the `peft` checkpoint.
"""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.methods import Form, Scheme
from app.domain.methods.named_schemes import WHOLE, ScaleType
from app.domain.methods.schemes import group_width
from app.domain.request.base_job import INPUTS
from bitwright.errors import CorruptCheckpoint
from workers.formats.cards.loading import BASE, BY_ITSELF, FOLDER, AdapterBase, Loading, with_adapter_file
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.stored_linear import StoredLinear, StoredLowRank, StoredPart
from workers.numerics.packing import pack_bytes, packed_bytes, unpack_bytes
from workers.numerics.quantized import (
    AffineWeight,
    BlockWeight,
    CodebookWeight,
    FloatWeight,
    LinearResult,
    LowRank,
    QuantizedAbsmax,
    QuantizedWeight,
)

VERSION = 2
DESCRIPTION = "bitwright.json"

LOAD_BITWRIGHT = """\
```python
from load_bitwright import load          # the file in this folder; needs torch, safetensors and transformers
from transformers import AutoTokenizer

model = load("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_NATIVE = """\
The loader makes an ordinary floating-point model. The weight files hold the codes and scales as they were made; ask
Bitwright for another format to run them packed."""

ABOUT_CORRECTIONS = """\
The low-rank factors are added to the weights, which is what was measured. `load("{folder}", merge=False)` gives the
quantized base alone, for an adapter in the format `peft`."""

NATIVE_ITSELF = """\
from load_bitwright import load          # the file in this folder; needs torch, safetensors and transformers

model = load("{folder}")"""

NATIVE_BASE = """\
from load_bitwright import load          # the file in the `native` checkpoint of the same job

model = load("{folder}", merge=False)"""


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name."""
    weight, low_rank = result.weight, result.low_rank
    parts = {
        "codes": pack_bytes(weight.codes, weight.scheme.code_bits),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        **_own_parts(weight),
        **({} if low_rank is None else {"lora_a": low_rank.a.contiguous(), "lora_b": low_rank.b.contiguous()}),
    }
    return {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    parts = _Parts(name, tensors)
    read = READERS[stored.form]
    return LinearResult(read(parts, stored), None if stored.low_rank is None else _low_rank(parts, stored.low_rank))


def describe(
    linears: Mapping[str, StoredLinear], parts: Mapping[str, StoredPart] = MappingProxyType({})
) -> dict[str, object]:
    """The content of `bitwright.json`: every quantized linear by its name in the checkpoint.

    parts   of linears that lie in a larger tensor of the original, or transposed: a loader puts them there
    """
    places = {name: part.model_dump(exclude_defaults=True) for name, part in parts.items()}
    return {
        "format": "bitwright",
        "version": VERSION,
        "linears": {name: stored.model_dump(exclude_defaults=True) for name, stored in linears.items()},
        **({"parts": places} if places else {}),
    }


def loading(about: Loading) -> list[str]:
    """The card's section "Load"."""
    lines = [LOAD_BITWRIGHT.format(folder=FOLDER), ABOUT_NATIVE]
    if about.apart is not None:
        return [with_adapter_file(about.apart, NATIVE_ITSELF.format(folder=FOLDER)), BY_ITSELF, *lines]
    corrected = any(linear.low_rank for linear in about.linears.values())
    return [*lines, *([ABOUT_CORRECTIONS.format(folder=FOLDER)] if corrected else [])]


def adapter_base(_schemes: Mapping[str, Scheme]) -> AdapterBase:
    """The checkpoint without its corrections as the base of the job's adapter."""
    return AdapterBase("The base is in the `native` checkpoint of the same job:", NATIVE_BASE.format(folder=BASE))


class _Parts:
    """The tensors of one linear by their last name, and its shape."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._name, self._tensors = name, tensors
        self.shape = torch.Size(int(n) for n in self["shape"])
        if len(self.shape) != 2:
            raise self.misfit()

    def __getitem__(self, suffix: str) -> Tensor:
        try:
            return self._tensors[f"{self._name}.{suffix}"]
        except KeyError as missing:
            raise CorruptCheckpoint(f"tensor {missing} is missing", field=self._name) from missing

    def codes(self, stored: StoredLinear) -> Tensor:
        """The codes, uint8 (out, in)."""
        packed, (out_features, in_features), bits = self["codes"], self.shape, stored.scheme.code_bits
        if packed.shape != (out_features, packed_bytes(in_features, bits)):
            raise self.misfit()
        return unpack_bytes(packed, bits, in_features)

    def dense(self, suffix: str, bits: int, shape: torch.Size) -> Tensor:
        """The codes of one tensor, uint8 of that shape, which are packed row after row."""
        packed = self[suffix]
        if packed.shape != (packed_bytes(prod(shape), bits),):
            raise self.misfit()
        return unpack_bytes(packed.unsqueeze(0), bits, prod(shape)).view(shape)

    def of_groups(self, suffix: str, stored: StoredLinear) -> Tensor:
        """A tensor with one number per group."""
        tensor = self[suffix]
        if tensor.shape != self.groups(stored):
            raise self.misfit()
        return tensor

    def groups(self, stored: StoredLinear) -> torch.Size:
        """The shape (out, groups)."""
        out_features, in_features = self.shape
        return torch.Size((out_features, in_features // group_width(stored.group_size, in_features)))

    def misfit(self) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"tensors of {self._name} do not fit its shape {tuple(self.shape)}", field=self._name)


def _own_parts(weight: QuantizedWeight) -> dict[str, Tensor]:
    if isinstance(weight, AffineWeight):
        return _affine_parts(weight)
    if isinstance(weight, BlockWeight):
        return _block_parts(weight)
    return _codebook_parts(weight) if isinstance(weight, CodebookWeight) else _float_parts(weight)


def _affine_parts(weight: AffineWeight) -> dict[str, Tensor]:
    parts = {"scale": weight.scale.contiguous()}
    if weight.zero_point is not None:
        parts["zero_point"] = pack_bytes(weight.zero_point.reshape(1, -1), weight.scheme.bits).flatten()
    if weight.offset is not None:
        parts["offset"] = weight.offset.contiguous()
    return parts


def _affine_weight(parts: _Parts, stored: StoredLinear) -> QuantizedWeight:
    scale = parts.of_groups("scale", stored)
    offset = parts.of_groups("offset", stored) if stored.offset else None
    zero = None
    if not stored.symmetric and offset is None:
        zero = parts.dense("zero_point", stored.bits, scale.shape)
    return AffineWeight(parts.codes(stored), scale, zero, stored.scheme, stored.torch_dtype, offset)


def _codebook_parts(weight: CodebookWeight) -> dict[str, Tensor]:
    # A codebook is one tensor for many linears, and safetensors refuses tensors that share memory.
    parts = {"codebook": weight.codebook.clone()}
    if isinstance(weight.absmax, Tensor):
        return parts | {"absmax": weight.absmax.contiguous()}
    return parts | {
        "absmax_codes": pack_bytes(weight.absmax.codes.reshape(1, -1), weight.absmax.bits).flatten(),
        "absmax_scale": weight.absmax.scale.contiguous(),
        "absmax_offset": weight.absmax.offset.clone(),
    }


def _codebook_weight(parts: _Parts, stored: StoredLinear) -> QuantizedWeight:
    codebook, level = parts["codebook"], stored.absmax
    absmax: Tensor | QuantizedAbsmax
    if level is None:
        absmax = parts.of_groups("absmax", stored)
    else:
        codes = parts.dense("absmax_codes", level.bits, parts.groups(stored))
        scale, offset = parts["absmax_scale"], parts["absmax_offset"]
        if scale.shape != (-(-codes.numel() // level.superblock),) or offset.numel() != 1:
            raise parts.misfit()
        absmax = QuantizedAbsmax(codes, scale, offset, level.bits, level.superblock)
    if codebook.shape != (2**stored.bits,):
        raise parts.misfit()
    return CodebookWeight(parts.codes(stored), codebook, absmax, stored.scheme, stored.torch_dtype)


def _float_parts(weight: FloatWeight) -> dict[str, Tensor]:
    others = {"global_scale": weight.global_scale, "input_amax": weight.input_amax}
    return {
        "scale": weight.scale.contiguous(),
        # One number of linears that a runtime joins, and safetensors refuses tensors that share memory.
        **{suffix: tensor.clone() for suffix, tensor in others.items() if tensor is not None},
    }


def _float_weight(parts: _Parts, stored: StoredLinear) -> QuantizedWeight:
    scheme, (rows, columns) = stored.scheme, parts.shape
    if scheme.row is None or scheme.form is not Form.FLOAT:
        raise parts.misfit()
    bands = 1 if scheme.group_rows == WHOLE else -(-rows // scheme.group_rows)
    scale, row = parts["scale"], scheme.row
    is_float = scale.is_floating_point() and scale.dtype.itemsize > 1
    right = {ScaleType.E8M0: scale.dtype == torch.uint8, ScaleType.E4M3: scale.dtype == torch.float8_e4m3fn}
    if scale.shape != (bands, scheme.groups(columns)) or not right.get(row.scale, is_float):
        raise parts.misfit()
    divisor = parts["global_scale"] if row.scale is ScaleType.E4M3 else None
    amax = parts["input_amax"] if stored.input_amax else None
    if any(number is not None and number.shape != (1,) for number in (divisor, amax)):
        raise parts.misfit()
    return FloatWeight(parts.codes(stored), scale, scheme, stored.torch_dtype, divisor, amax)


def _block_parts(weight: BlockWeight) -> dict[str, Tensor]:
    kind = weight.kind
    levels = {"scale_codes": (weight.scale_codes, kind.scales), "minimum_codes": (weight.minimum_codes, kind.minimums)}
    parts = {"scale": weight.scale.contiguous()}
    if weight.minimum is not None:
        parts["minimum"] = weight.minimum.contiguous()
    for name, (codes, integers) in levels.items():
        if codes is not None and integers is not None:
            parts[name] = pack_bytes(codes.reshape(1, -1), integers.bits).flatten()
    return parts


def _block_weight(parts: _Parts, stored: StoredLinear) -> QuantizedWeight:
    scheme, kind, (rows, columns) = stored.scheme, stored.scheme.blocks, parts.shape
    if kind is None or columns % kind.weights:
        raise parts.misfit()
    blocks, sub_blocks = (torch.Size((rows, columns // size)) for size in (kind.weights, kind.columns))
    halves = [parts["scale"], *([parts["minimum"]] if kind.offset else [])]
    if any(number.shape != blocks or number.dtype != torch.float16 for number in halves):
        raise parts.misfit()
    scales, minimums = (
        None if of is None else parts.dense(suffix, of.bits, sub_blocks)
        for suffix, of in (("scale_codes", kind.scales), ("minimum_codes", kind.minimums))
    )
    minimum = halves[1] if kind.offset else None
    return BlockWeight(parts.codes(stored), halves[0], scheme, stored.torch_dtype, scales, minimum, minimums)


READERS: Mapping[Form, Callable[[_Parts, StoredLinear], QuantizedWeight]] = {
    Form.AFFINE: _affine_weight,
    Form.CODEBOOK: _codebook_weight,
    Form.FLOAT: _float_weight,
    Form.BLOCKS: _block_weight,
}


def _low_rank(parts: _Parts, stored: StoredLowRank) -> LowRank:
    low_rank, (out_features, in_features) = LowRank(parts["lora_a"], parts["lora_b"], stored.alpha), parts.shape
    if (low_rank.a.shape, low_rank.b.shape) != ((stored.rank, in_features), (out_features, stored.rank)):
        raise parts.misfit()
    return low_rank


FORMAT = checkpoint_format(
    Layout(
        compress,
        stem="weights",
        files=lambda linears, parts: {DESCRIPTION: describe(linears, parts)},
        needs_loader=lambda _schemes: True,
        kv_cache=lambda attention, scales: scales.tensors(attention),
        inputs=INPUTS,
    ),
    loading,
    adapter_base,
    decompress,
)
