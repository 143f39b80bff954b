"""Load a Bitwright native checkpoint into transformers. Needs torch, safetensors and transformers, nothing else.

    from load_bitwright import load
    model = load("path/to/checkpoint")          # a transformers model with ordinary floating-point weights

or, to see only the weights:    python load_bitwright.py path/to/checkpoint

Each quantized linear `name` is stored as

    name.codes       uint8 (out, ceil(in * bits / 8))   unsigned codes, dense along a row, lowest bit first
    name.scale       (out, groups)                      one scale for each group of consecutive inputs, of either sign
    name.zero_point  uint8                              dense, row after row; a symmetric linear has 2^(bits-1) instead
    name.shape       int64 (2)                          (out, in)

and stands for the weight  scale * (codes - zero_point), computed in fp32 and rounded once to its dtype.
`bitwright.json` says bits, group_size (-1: one group a row), symmetric and dtype for each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

VERSION = 1


def load(folder: str | Path, **options: Any) -> Any:
    """The model with dequantized weights; `options` go to `from_pretrained` (device_map, attn_implementation, ...)."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  (the weights alone need no transformers)

    config = AutoConfig.from_pretrained(folder)
    weights = load_weights(folder)
    options.setdefault("dtype", config.dtype or torch.float32)
    model = AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=weights, **options)
    return model.eval()


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of the original checkpoint by its name, quantized ones dequantized.

    Raises:
        ValueError: the files contradict each other; the message names the file or tensor.
    """
    folder = Path(folder)
    description = json.loads((folder / "bitwright.json").read_text())
    if description.get("format") != "bitwright" or description.get("version") != VERSION:
        raise ValueError(f"bitwright.json: this loader reads version {VERSION} of the format bitwright")
    tensors = read_tensors(folder)
    weights = {}
    for name, scheme in description["linears"].items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in ("codes", "scale", "zero_point", "shape")}
        weights[f"{name}.weight"] = dequantize(name, parts, scheme)
    return tensors | weights


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The stored tensors of all weight files; each must be where the index says."""
    index = folder / "weights.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if index.exists() else None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())) if where else ["weights.safetensors"]:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {file!r}, which is not a weight file in the same folder")
        with safe_open(folder / file, framework="pt") as stored:
            names = set(stored.keys())
            if where and names != {name for name, place in where.items() if place == file}:
                raise ValueError(f"{file} does not hold the tensors that {index.name} says")
            tensors |= {name: stored.get_tensor(name) for name in names}
    return tensors


def dequantize(name: str, parts: dict[str, Tensor | None], scheme: dict[str, Any]) -> Tensor:
    """The weight (out, in) of one linear: scale * (codes - zero_point)."""
    packed, scale, zero_point, shape = parts["codes"], parts["scale"], parts["zero_point"], parts["shape"]
    if packed is None or scale is None or shape is None or (zero_point is None) != scheme["symmetric"]:
        raise ValueError(f"{name}: a tensor is missing, or there is one too many")
    bits, (rows, columns) = scheme["bits"], shape.tolist()
    groups = 1 if scheme["group_size"] == -1 else columns // scheme["group_size"]
    if packed.dtype != torch.uint8 or packed.shape != (rows, -(-columns * bits // 8)) or scale.shape != (rows, groups):
        raise ValueError(f"{name}: codes {tuple(packed.shape)} and scale {tuple(scale.shape)} do not fit {scheme}")
    codes = unpack(packed, bits, columns).float().unflatten(1, (groups, -1))
    zero: Tensor | float = 2.0 ** (bits - 1)
    if zero_point is not None:
        zero = unpack(zero_point.unsqueeze(0), bits, rows * groups).float().view(rows, groups, 1)
    return ((codes - zero) * scale.float().unsqueeze(-1)).flatten(1).to(getattr(torch, scheme["dtype"]))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """uint8 (rows, bytes) -> the first `count` codes of each row, uint8. Eight codes take `bits` bytes."""
    missing = -(-count // 8) * bits - stream.shape[1]
    octets = torch.nn.functional.pad(stream, (0, missing)).unflatten(1, (-1, bits)).to(torch.int16)
    codes = []
    for start in range(0, 8 * bits, bits):
        byte, shift = divmod(start, 8)
        value = octets[..., byte] >> shift
        if shift + bits > 8:
            value = value | octets[..., byte + 1] << (8 - shift)
        codes.append(value & (2**bits - 1))
    return torch.stack(codes, dim=-1).flatten(1)[:, :count].to(torch.uint8)


if __name__ == "__main__":
    for tensor_name, tensor in sorted(load_weights(sys.argv[1]).items()):
        print(f"{tensor_name}  {tuple(tensor.shape)}  {tensor.dtype}")  # noqa: T201
