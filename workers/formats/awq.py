"""The `awq` format: AutoAWQ's words for its GEMM kernels, 4 bits, a zero point for each group.

    name.qweight, name.qzeros, name.scales    `workers.formats.packed.words`

A symmetric weight is stored with the zero point 8 and says so like any other: GPTQModel, which transformers reads AWQ
with, has no form without. config.json has one group size for the whole model.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.inputs.architectures import HEAD
from app.domain.methods import Scheme
from bitwright.errors import FormatCannotHold
from workers.formats.checkpoint import Layout, checkpoint_format
from workers.formats.packed.loading import LOADER, base_of, sections
from workers.formats.packed.words import AWQ_ORDER, IN_A_WORD, affine_alone, affine_weight, parts_of, whole_zeros
from workers.formats.stored_linear import StoredLinear
from workers.numerics.packing import pack_words, unpack_words
from workers.numerics.quantized import LinearResult

BITS = 4


def compress(name: str, result: LinearResult) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name.

    Raises:
        FormatCannotHold: the weight is not one that the format holds as it is.
    """
    weight = affine_alone(name, result, ExportFormat.AWQ, torch.float16)
    zeros = whole_zeros(name, weight, ExportFormat.AWQ)
    return {
        f"{name}.qweight": _packed(weight.codes.T),
        f"{name}.qzeros": _packed(zeros.T),
        f"{name}.scales": weight.scale.T.contiguous(),
    }


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear) -> LinearResult:
    """The exact inverse of `compress`.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    words, zeros, scales = parts_of(name, tensors, "qweight", "qzeros", "scales")
    return affine_weight(name, _unpacked(words).T.contiguous(), _unpacked(zeros).T, scales, stored)


def config(schemes: Mapping[str, Scheme], ignored: Collection[str]) -> dict[str, object]:
    """The `quantization_config` of config.json; arguments as those of `Layout.config`.

    Raises:
        FormatCannotHold: linears differ in their groups, for which it has no place.
    """
    groups = {scheme.group_size for scheme in schemes.values()}
    if len(groups) != 1:
        detail = f"awq says one group size for the whole model, and these are {sorted(groups)}"
        raise FormatCannotHold(detail, field="formats", value="awq", hint='ask for formats: ["compressed-tensors"]')
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": groups.pop(),
        "zero_point": True,
        "lm_head": HEAD in schemes,
        "modules_to_not_convert": sorted(set(ignored) - schemes.keys()),
    }


def _packed(codes: Tensor) -> Tensor:
    """uint8 (rows, n) -> int32 (rows, n / 8)."""
    ordered = codes.reshape(len(codes), -1, IN_A_WORD)[..., list(AWQ_ORDER)]
    return pack_words(ordered.flatten(1), BITS)


def _unpacked(words: Tensor) -> Tensor:
    """The inverse of `_packed`."""
    codes = unpack_words(words.contiguous(), BITS, words.shape[1] * IN_A_WORD).view(len(words), -1, IN_A_WORD)
    places = [AWQ_ORDER.index(output) for output in range(IN_A_WORD)]
    return codes[..., places].flatten(1)


FORMAT = checkpoint_format(
    Layout(
        compress,
        config=lambda targets, ignored: {"quantization_config": config(targets, ignored)},
        needs_loader=lambda _schemes: True,
        loader=LOADER,
    ),
    sections(ExportFormat.AWQ),
    base_of(ExportFormat.AWQ),
    decompress,
)
