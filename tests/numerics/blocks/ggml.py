"""llama.cpp's own quantizers and decoders, by the C functions of its library.

`make test-llama-cpp` installs it. Its functions need no model, no file and no process of their own.
"""

import ctypes as c
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.engine.ships.llama_cpp import BINARIES

DECODERS = {name: f"{name[:-1]}K" for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")}
"""Where the name of a type's function is not the type's."""


@cache
def library(folder: Path) -> c.CDLL:
    """The library of an installation."""
    ggml = c.CDLL(str(folder / BINARIES / "libggml-base.so"), mode=c.RTLD_GLOBAL)
    ggml.ggml_quantize_chunk.restype = c.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p]
    return ggml


def quantized(folder: Path, number: int, size: int, weight: Tensor, importance: Tensor | None) -> Tensor:
    """Bytes (out, `size`) that its quantizer makes of a weight fp32 (out, in), with an importance fp32 (in,) or not."""
    ggml, (rows, columns) = library(folder), weight.shape
    ggml.ggml_quantize_init(number)
    data, weight = torch.zeros(rows, size, dtype=torch.uint8), weight.contiguous()
    weights = None if importance is None else importance.contiguous().data_ptr()
    written = ggml.ggml_quantize_chunk(number, weight.data_ptr(), data.data_ptr(), 0, rows, columns, weights)
    assert written == data.numel()
    return data


def decoded(folder: Path, name: str, data: Tensor, columns: int) -> Tensor:
    """The weight fp32 (out, columns) of rows of bytes."""
    decode = getattr(library(folder), f"dequantize_row_{DECODERS.get(name, name)}")
    decode.argtypes = [c.c_void_p, c.c_void_p, c.c_int64]
    weight = torch.zeros(len(data), columns)
    decode(data.contiguous().data_ptr(), weight.data_ptr(), weight.numel())
    return weight
