"""bitsandbytes' NF4, as its `Linear4bit` saves it and transformers reads it.

    name.weight                                  uint8 (out * in / 2, 1)    two codes a byte, the first in its high half
    name.weight.absmax                           fp32 (blocks), or uint8 with
    name.weight.nested_absmax                    fp32 (ceil(blocks / B1)) and
    name.weight.nested_quant_map                 fp32 (256)
    name.weight.quant_map                        fp32 (16)                  the codebook
    name.weight.quant_state.bitsandbytes__nf4    uint8, JSON: shape, dtype, block sizes, offset of a nested absmax

    W_hat = absmax * quant_map[code]         absmax of a block; or nested_quant_map[code] * nested_absmax + offset

Blocks go row after row; they are our groups, since those divide rows. The codebook is the library's own 16 numbers. Its
second level looks codes up in a table of any 256 numbers: ours are code / (2^b1 - 1). Both are the same numbers, but
the library multiplies table and scale where `QuantizedAbsmax` multiplies code and scale first: the last bit of an
absmax in fp32 may differ, which in 16 bits is a weight in some ten thousand, by its last bit. Absmax that are plain
numbers are exact.

Read in bitsandbytes 0.50.2 (`functional.py`, `QuantState`).
"""

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.inputs.quantized.bitsandbytes import STATE
from app.domain.methods import Scheme
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.packed.loading import LOADER, base_of, sections
from workers.formats.packed.words import parts_of
from workers.formats.stored_linear import StoredLinear
from workers.numerics.normal_float import codebook
from workers.numerics.packing import pack_bytes
from workers.numerics.quantized import CodebookWeight, LinearResult, QuantizedAbsmax

KIND = "nf4"
TABLE = 256
SECOND_BLOCKS = frozenset({64, 128, 256, 512, 1024, 2048, 4096})
"""Sizes that all of the library's kernels take."""


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        FormatCannotHold: another form or codebook, or blocks that the library does not have.
    """
    weight = _held(name, result)
    state: dict[str, object] = {
        "quant_type": KIND,
        "blocksize": weight.group_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    octets = pack_bytes(weight.codes.reshape(-1, 2).flip(1), weight.scheme.bits)
    parts = {"": octets, ".quant_map": weight.codebook.clone()}
    absmax = weight.absmax
    if isinstance(absmax, Tensor):
        parts[".absmax"] = absmax.float().flatten()
    else:
        parts[".absmax"] = absmax.codes.flatten().contiguous()
        parts[".nested_absmax"] = absmax.scale.float().contiguous()
        parts[".nested_quant_map"] = _table(absmax.bits)
        state |= {
            "nested_blocksize": absmax.superblock,
            "nested_dtype": "float32",
            "nested_offset": float(absmax.offset),
        }
    parts[f"{STATE}{KIND}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{name}.weight{suffix}": tensor.contiguous().clone() for suffix, tensor in parts.items()}


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`; plain maxima and scales of the second level come back in fp32.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    octets, levels, absmax, about = parts_of(
        name, tensors, "weight", "weight.quant_map", "weight.absmax", f"weight{STATE}{KIND}"
    )
    try:
        state = json.loads(bytes(about.tolist()))
        (rows, columns), offset = state["shape"], state.get("nested_offset")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"the quant_state of {name} cannot be read: {error}", field=name) from error
    groups = (rows, columns // stored.scheme.width(columns))
    if octets.numel() * 2 != rows * columns or absmax.numel() != groups[0] * groups[1]:
        raise CorruptCheckpoint(f"tensors of {name} do not fit its shape ({rows}, {columns})", field=name)
    codes = torch.cat((octets.view(-1, 1) >> 4, octets.view(-1, 1) & 15), dim=1).view(rows, columns)
    maxima: Tensor | QuantizedAbsmax = absmax.view(groups)
    if stored.absmax is not None:
        (scale,) = parts_of(name, tensors, "weight.nested_absmax")
        second = torch.tensor(offset, dtype=torch.float32)
        maxima = QuantizedAbsmax(absmax.view(groups), scale, second, stored.absmax.bits, stored.absmax.superblock)
    return LinearResult(CodebookWeight(codes, levels, maxima, stored.scheme, stored.torch_dtype))


def config(linears: Mapping[str, Scheme], ignored: Collection[str]) -> dict[str, object]:
    """The `quantization_config` of config.json; arguments as those of `Layout.config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": KIND,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(set(ignored) - linears.keys()),
    }


def _held(name: str, result: LinearResult) -> CodebookWeight:
    """The weight, if it is one that the format holds."""
    weight, native = result.weight, 'ask for formats: ["native"] or ["merged"]'
    if not isinstance(weight, CodebookWeight) or result.low_rank is not None:
        raise FormatCannotHold(
            "bitsandbytes holds NF4 weights, without low-rank factors",
            field=name,
            hint=f'{native}, or add "peft" for the low-rank factors',
        )
    if not ExportFormat.BITSANDBYTES.info.holds(weight.scheme):
        raise FormatCannotHold(f"bitsandbytes does not hold {weight.scheme}", field=name, hint=native)
    if not torch.equal(weight.codebook.cpu(), codebook(4)):
        raise FormatCannotHold("bitsandbytes holds its own NF4 codebook, and this is another", field=name, hint=native)
    second = weight.absmax
    if isinstance(second, QuantizedAbsmax) and second.superblock not in SECOND_BLOCKS:
        sizes = ", ".join(map(str, sorted(SECOND_BLOCKS)))
        detail = f"bitsandbytes shares a scale among {sizes} maxima, not {second.superblock}"
        raise FormatCannotHold(detail, field=name, value=second.superblock, hint=native)
    return weight


def _table(bits: int) -> Tensor:
    """code / (2^bits - 1), fp32 (256); what no code reaches is 0."""
    top = 2**bits - 1
    table = torch.zeros(TABLE)
    table[: top + 1] = torch.arange(top + 1) * (1 / top)
    return table


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": config(targets, ignored)},
        needs_loader=lambda _schemes: True,
        loader=LOADER,
    ),
    sections(ExportFormat.BITSANDBYTES),
    base_of(ExportFormat.BITSANDBYTES),
    decompress,
)
