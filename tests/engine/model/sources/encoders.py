"""The tiny model with its linears quantized in each way that is read, by simple encoders."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
"""QLoRA, appendix E."""

Encoded = Mapping[str, Tensor]
Encoder = Callable[[Tensor], Encoded]


def packed_words(codes: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Four-bit codes, eight a word along the last dimension; `order` is the code at each place from the lowest bits."""
    lanes = codes.long().view(*codes.shape[:-1], -1, 8)[..., list(order)]
    words = (lanes << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scale and zero points (out, groups) of four bits."""
    each = weight.float().view(len(weight), -1, GROUP)
    low, high = each.amin(-1).clamp_max(0), each.amax(-1).clamp_min(0)
    scale = ((high - low) / 15).clamp_min(1e-6).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (each / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    return codes.view_as(weight).to(torch.uint8), scale, zero.to(torch.uint8)


def gptq(weight: Tensor) -> Encoded:
    codes, scale, zero = grouped(weight)
    stored_zero = (zero.int() - 1) % 16
    return {
        "qweight": packed_words(codes).T,
        "qzeros": packed_words(stored_zero.T.contiguous()),
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(weight: Tensor) -> Encoded:
    codes, scale, zero = grouped(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": packed_words(codes.T.contiguous(), order),
        "qzeros": packed_words(zero.T.contiguous(), order),
        "scales": scale.T,
    }


def fp8(weight: Tensor) -> Encoded:
    """Blocks of 48 x 40, which divide no side."""
    rows, columns = -(-weight.shape[0] // 48), -(-weight.shape[1] // 40)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.001
    wide = scale.repeat_interleave(48, 0)[: len(weight)].repeat_interleave(40, 1)[:, : weight.shape[1]]
    return {"weight": (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def nf4(weight: Tensor) -> Encoded:
    blocks = weight.float().view(-1, 64)
    absmax = blocks.abs().amax(-1).clamp_min(1e-6)
    codes = (
        ((blocks / absmax.unsqueeze(1)).unsqueeze(-1) - torch.tensor(NF4)).abs().argmin(-1).flatten().to(torch.uint8)
    )
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "weight": (codes[0::2] << 4 | codes[1::2]).view(-1, 1),
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def int8(weight: Tensor) -> Encoded:
    largest = weight.float().abs().amax(1)
    return {"weight": (weight.float() / largest.unsqueeze(1) * 127).round().to(torch.int8), "SCB": largest}


PACKED = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=True)


def compressed(weight: Tensor) -> Encoded:
    scale = weight.float().view(len(weight), -1, GROUP).abs().amax(-1).clamp_min(1e-6) / 8
    scheme = QuantizationScheme(targets=["Linear"], weights=PACKED, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return dict(compressor.compress({"weight": weight.float(), "weight_scale": scale.bfloat16().float()}, scheme))


KINDS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": PACKED.model_dump(mode="json")}},
        },
    ),
}


def quantized_folder(model: Path, folder: Path, kind: str) -> Path:
    """A copy of a model's folder with the linears of its blocks quantized."""
    encode, settings = KINDS[kind]
    shutil.copytree(model, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix("weight")
            tensors |= {f"{module}{part}": value.contiguous() for part, value in encode(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
