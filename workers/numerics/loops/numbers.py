"""Numbers of tensors in compiled loops: fp32 as they are, bf16 by their bits, which Numba does not know.

A bf16 tensor is given as `uint16`. All arithmetic is fp32, rounded to nearest, ties to even, as torch does it.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor


def array(tensor: Tensor) -> Any:
    """The tensor's memory as loops take it.

    Raises:
        TypeError: of another dtype than theirs, or of one that NumPy does not know.
    """
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def wide(number: Any) -> Any:
    """A number of an array in fp32."""
    raise NotImplementedError("compiled only")


def rounded(value: Any, like: Any) -> Any:
    """An fp32 number rounded to what the array `like` holds, in fp32."""
    raise NotImplementedError("compiled only")


def stored(value: Any, like: Any) -> Any:
    """An fp32 number as what the array `like` holds, rounded to it."""
    raise NotImplementedError("compiled only")


@njit
def _of_bits(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit
def _to_bits(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    half = np.uint32(np.uint32(0x7FFF) + (np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    rounded = np.uint16(np.uint32(bits + half) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)  # noqa: PLR0124 (NaN alone differs from itself)


@overload(wide)
def _wide(number: Any) -> Any:
    if number == types.uint16:

        def of_bits(number: Any) -> Any:
            return _of_bits(number)

        return of_bits

    def of_number(number: Any) -> Any:
        return np.float32(number)

    return of_number


@overload(rounded)
def _rounded(value: Any, like: Any) -> Any:
    if like.dtype == types.uint16:

        def to_bits_and_back(value: Any, like: Any) -> Any:
            return _of_bits(_to_bits(value))

        return to_bits_and_back

    def unchanged(value: Any, like: Any) -> Any:
        return np.float32(value)

    return unchanged


@overload(stored)
def _stored(value: Any, like: Any) -> Any:
    if like.dtype == types.uint16:

        def to_bits(value: Any, like: Any) -> Any:
            return _to_bits(value)

        return to_bits

    def unchanged(value: Any, like: Any) -> Any:
        return np.float32(value)

    return unchanged
