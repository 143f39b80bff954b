"""Load a Bitwright checkpoint into transformers. Needs torch, safetensors and transformers, nothing else.

    from load_bitwright import load
    model = load("path/to/checkpoint")          # a transformers model with ordinary floating-point weights

or, to see only the weights:    python load_bitwright.py path/to/checkpoint

A quantized linear stands for the weight  scale * (codes - zero_point), computed in fp32 and rounded once. Its tensors:

    native              compressed-tensors      shape, dtype
    name.codes          name.weight_packed      (out, inputs packed) uint8 | int32: dense along a row, lowest bit first
    name.scale          name.weight_scale       (out, groups): one for each group of consecutive inputs, of either sign
    name.zero_point     name.weight_zero_point  dense, row after row, uint8 | dense along the outputs, int32
    name.shape          name.weight_shape       (2) int64: (out, in)

A symmetric linear has no zero_point tensor: it is 2^(bits-1). Bits, group size (-1: one group a row) and symmetry of
each are in `bitwright.json` (native) or in the quantization_config of `config.json`.
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
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights that are passed are not packed any more
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    options.setdefault("dtype", config.dtype or torch.float32)
    return model_class.from_pretrained(None, config=config, state_dict=load_weights(folder), **options).eval()


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of the original checkpoint by its name, quantized ones dequantized.

    Raises:
        ValueError: the files contradict each other; the message names the file or tensor.
    """
    folder = Path(folder)
    native = (folder / "bitwright.json").exists()
    tensors = read_tensors(folder, "weights" if native else "model")
    weights = {}
    for name, scheme in (native_schemes(folder) if native else packed_schemes(folder, tensors)).items():
        stored = {"codes": "codes" if native else "packed", "scale": "scale", "zero": "zero_point", "shape": "shape"}
        prefix = name + ("." if native else ".weight_")
        parts = {part: tensors.pop(prefix + ending, None) for part, ending in stored.items()}
        weights[f"{name}.weight"] = dequantize(name, scheme, parts)
    return tensors | weights


def native_schemes(folder: Path) -> dict[str, dict[str, Any]]:
    """What `bitwright.json` says of each quantized linear."""
    description = json.loads((folder / "bitwright.json").read_text(encoding="utf-8"))
    if description.get("format") != "bitwright" or description.get("version") != VERSION:
        raise ValueError(f"bitwright.json: this loader reads version {VERSION} of the format bitwright")
    linears: dict[str, dict[str, Any]] = description["linears"]
    return linears


def packed_schemes(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What the quantization_config of `config.json` says of each linear that has packed weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    by_target = {target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]}
    schemes = {}
    for name in sorted(key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")):
        weights = by_target.get(name, by_target.get("Linear"))
        if weights is None:
            raise ValueError(f"config.json: no group of quantization_config names {name}")
        schemes[name] = {
            "bits": weights["num_bits"],
            "group_size": weights["group_size"] or -1,
            "symmetric": weights["symmetric"],
            "dtype": str(tensors[f"{name}.weight_scale"].dtype).removeprefix("torch."),
        }
    return schemes


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The stored tensors of all weight files; each must be where the index says."""
    index = folder / f"{stem}.safetensors.index.json"
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())) if where else [f"{stem}.safetensors"]:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {file!r}, which is not a weight file in the same folder")
        with safe_open(folder / file, framework="pt") as stored:
            names = set(stored.keys())
            if where and names != {name for name, place in where.items() if place == file}:
                raise ValueError(f"{file} does not hold the tensors that {index.name} says")
            tensors |= {name: stored.get_tensor(name) for name in names}
    return tensors


def dequantize(name: str, scheme: dict[str, Any], parts: dict[str, Tensor | None]) -> Tensor:
    """The weight (out, in) of one linear: scale * (codes - zero_point)."""
    packed, scale, zero_point, shape = parts["codes"], parts["scale"], parts["zero"], parts["shape"]
    if packed is None or scale is None or shape is None or (zero_point is None) != scheme["symmetric"]:
        raise ValueError(f"{name}: a tensor is missing, or there is one too many")
    bits, (rows, columns) = scheme["bits"], shape.tolist()
    groups = 1 if scheme["group_size"] == -1 else columns // scheme["group_size"]
    width = -(-columns * bits // (8 * packed.element_size()))
    if packed.shape != (rows, width) or scale.shape != (rows, groups) or columns % groups:
        raise ValueError(f"{name}: codes {tuple(packed.shape)} and scale {tuple(scale.shape)} do not fit {scheme}")
    codes = unpack(packed, bits, columns).float().view(rows, groups, -1)
    zero: Tensor | float = 2.0 ** (bits - 1)
    if zero_point is not None and zero_point.dtype == torch.uint8:
        zero = unpack(zero_point.unsqueeze(0), bits, rows * groups).float().view(rows, groups, 1)
    elif zero_point is not None:
        zero = unpack(zero_point.T, bits, rows).T.float().reshape(rows, groups, 1)
    return ((codes - zero) * scale.float().unsqueeze(-1)).view(rows, columns).to(getattr(torch, scheme["dtype"]))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """uint8 or little-endian int32 (rows, any) -> the first `count` codes of each row, uint8."""
    octets = stream.flatten().view(torch.uint8).view(len(stream), -1)
    steps = -(-count // 8)  # eight codes take `bits` bytes
    octets = torch.nn.functional.pad(octets, (0, max(0, steps * bits - octets.shape[1])))[:, : steps * bits]
    octets = octets.reshape(-1, steps, bits).to(torch.int16)
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
