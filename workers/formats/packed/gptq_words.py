"""GPTQ's checkpoint in both forms of its zero points: tensors of a linear, and the quantization_config.

    name.qweight, name.qzeros, name.scales    `workers.formats.packed.words`
    name.g_idx                                int32 (in)   group of each input, in order

The first form (checkpoint_format gptq) stores zero points less one, and readers add it to whole words: a zero point of
0 would borrow from its neighbour. So the first form is written for symmetric weights alone, and `gptq_v2` for any.

One scheme is the checkpoint's; linears of others, and those that stay as they are, are named by patterns (`dynamic`),
which GPTQModel and vLLM match from the start of a module's name. vLLM asks for the name of what it fuses, so that goes
into a pattern with its parts.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from importlib.metadata import version
from re import escape

import torch
from torch import Tensor

from app.domain.formats import VLLM_FUSED, ExportFormat
from app.domain.inputs.architectures import HEAD
from app.domain.methods import Scheme
from workers.formats.packed.words import affine_alone, affine_weight, parts_of, whole_zeros
from workers.formats.stored_linear import StoredLinear
from workers.numerics.packing import pack_words, unpack_words
from workers.numerics.quantized import LinearResult

FUSED = dict(zip(("qkv_proj", "gate_up_proj"), VLLM_FUSED, strict=True))
"""vLLM's name of a fused linear -> those of its parts."""


def compress(name: str, result: LinearResult, export_format: ExportFormat, less: int) -> dict[str, Tensor]:
    """The stored tensors of the linear `name`, by full name; zero points are stored `less` that.

    Raises:
        FormatCannotHold: the weight is not one that the format holds as it is.
    """
    weight = affine_alone(name, result, export_format, torch.float16)
    zeros, bits = whole_zeros(name, weight, export_format), weight.scheme.bits
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size
    return {
        f"{name}.qweight": pack_words(weight.codes, bits).T.contiguous(),
        f"{name}.qzeros": pack_words((zeros - less).T.contiguous(), bits),
        f"{name}.scales": weight.scale.T.contiguous(),
        f"{name}.g_idx": groups,
    }


def decompress(name: str, tensors: Mapping[str, Tensor], stored: StoredLinear, less: int) -> LinearResult:
    """The exact inverse of `compress`.

    Raises:
        CorruptCheckpoint: a tensor is missing, or their shapes do not fit together.
    """
    words, zeros, scales = parts_of(name, tensors, "qweight", "qzeros", "scales")
    bits = stored.scheme.bits
    codes = unpack_words(words.T.contiguous(), bits, words.shape[0] * 32 // bits)
    points = unpack_words(zeros, bits, scales.shape[1]).T + less
    return affine_weight(name, codes, points, scales, stored)


def config(schemes: Mapping[str, Scheme], ignored: Collection[str], form: str) -> dict[str, object]:
    """The `quantization_config` of config.json.

    schemes   every quantized linear by module name
    ignored   module names of all other linears, the head included
    form      checkpoint_format
    """
    usual = Counter(schemes.values()).most_common(1)[0][0]
    others: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme != usual:
            others.setdefault(scheme, []).append(name)
    rules = {f"+:{_pattern(names)}": _settings(scheme) for scheme, names in others.items()}
    left = sorted(set(ignored) - schemes.keys())
    return {
        "quant_method": "gptq",
        "checkpoint_format": form,
        **_settings(usual),
        "desc_act": False,
        "lm_head": HEAD in schemes,
        "pack_dtype": "int32",
        "dynamic": {**rules, **({f"-:{_pattern(left)}": {}} if left else {})},
        "meta": {"quantizer": [f"bitwright:{version('bitwright')}"]},
    }


def _settings(scheme: Scheme) -> dict[str, object]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _pattern(names: Collection[str]) -> str:
    """A regular expression for exactly these modules, and for what vLLM makes of them where it fuses all its parts."""
    known, fused = set(names), set[str]()
    for name in names:
        parent, dot, last = name.rpartition(".")
        for together, parts in FUSED.items():
            if last in parts and all(f"{parent}{dot}{part}" in known for part in parts):
                fused.add(f"{parent}{dot}{together}")
    return f"^(?:{'|'.join(escape(name) for name in sorted(known | fused))})$"
