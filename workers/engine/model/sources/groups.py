"""Weights of integer codes in groups of inputs: compressed-tensors', GPTQ's and AWQ's layouts to fp32.

W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]), with g the group of the input i. The layouts differ in where codes
lie, in what is added to zero points, and in which side comes first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from app.domain.inputs.quantized.stored import QuantizedTensor, corrupt
from workers.numerics.packing import unpack_words

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, counted from the lowest bits, of each of eight consecutive outputs."""


def naive(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """compressed-tensors' codes that are numbers, I8 or F8 (out, in), with signed zero points."""
    scale = parts["scale"].float().reshape(-1, weight.number("groups"))
    zeros = parts["zeros"].float().view_as(scale) if "zeros" in parts else torch.zeros(())
    return _weighted(parts["codes"].float(), zeros, scale, _group_of_inputs(parts, weight))


def packed(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """compressed-tensors' packed codes and zero points, both plus 2^(bits - 1)."""
    bits, (rows, columns) = weight.number("bits"), weight.shape
    scale = parts["scale"].float().reshape(-1, weight.number("groups"))
    zeros = torch.full((), 2.0 ** (bits - 1))
    if "zeros" in parts:
        zeros = unpack_words(parts["zeros"].T.contiguous(), bits, rows).T.float()
    codes = unpack_words(parts["codes"], bits, columns).float()
    return _weighted(codes, zeros, scale, _group_of_inputs(parts, weight))


def decompressed(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:  # noqa: ARG001 - it is stored whole
    """The weight that compressed-tensors' codes meant, as it is stored."""
    return parts["weight"].float()


def gptq(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """GPTQ's codes, packed along the inputs, and zero points, along the outputs; the first format's are one less."""
    bits, (rows, columns) = weight.number("bits"), weight.shape
    zeros = unpack_words(parts["zeros"], bits, rows)
    zeros = (zeros + weight.number("zero")) & (2**bits - 1)
    codes = unpack_words(parts["codes"].T.contiguous(), bits, columns).float()
    return _weighted(codes, zeros.T.float(), parts["scale"].T.float(), _group_of_inputs(parts, weight))


def awq(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """AWQ's codes and zero points, packed along the outputs in an order of their own."""
    zeros = _unordered(parts["zeros"]).T.float() if "zeros" in parts else torch.full((), 8.0)
    codes = _unordered(parts["codes"]).T.float()
    return _weighted(codes, zeros, parts["scale"].T.float(), _group_of_inputs(parts, weight))


def _unordered(words: Tensor) -> Tensor:
    """Codes of words in AWQ's order: int32 (rows, n) -> uint8 (rows, 8 n)."""
    codes = unpack_words(words.contiguous(), 4, words.shape[1] * 8)
    return codes.view(len(codes), -1, 8)[..., list(AWQ_ORDER)].flatten(1)


def _group_of_inputs(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor | None:
    """Index of each input's group, int64 (in,); None if all inputs share one.

    Raises:
        CorruptCheckpoint: a stored index is of no group.
    """
    groups = weight.number("groups")
    order = parts.get("order")
    # compressed-tensors writes -1 where inputs are in order.
    if order is None or bool((order == -1).all()):
        return None if groups == 1 else torch.arange(weight.shape[1]) // weight.number("group")
    order = order.long()
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise corrupt(weight.parts["order"], f"names groups {int(order.min())} to {int(order.max())} of {groups}")
    return order


def _weighted(codes: Tensor, zeros: Tensor, scale: Tensor, groups: Tensor | None) -> Tensor:
    """(codes - zeros) * scale, with zeros () or as scale (1 or out, groups)."""
    if groups is None:
        return (codes - zeros) * scale
    zeros = zeros[:, groups] if zeros.dim() else zeros
    return (codes - zeros) * scale[:, groups]
