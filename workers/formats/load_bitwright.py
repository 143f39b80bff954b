"""Load a Bitwright checkpoint into transformers. Needs torch, safetensors and transformers only.

    from load_bitwright import load
    model = load("path/to/checkpoint")          # a transformers model with ordinary floating-point weights

or, to see only the weights:    python load_bitwright.py path/to/checkpoint

A quantized linear stands for the weight below, computed in fp32 and rounded once. Its tensors, each after `name.`:

    affine, native      compressed-tensors      scale * (codes - zero_point), or scale * codes + offset
    codes               weight_packed           (out, inputs packed) uint8 | int32: dense along a row, lowest bit first
                        weight                  (out, in) int8, of 8 bits: codes minus 128
    scale               weight_scale            (out, groups): one per group of consecutive inputs, of either sign
    zero_point          weight_zero_point       dense, row after row, uint8 | dense along the outputs, int32
    offset                                      (out, groups): in place of a zero point
    shape               weight_shape            (2) int64: (out, in)

    codebook, native    absmax * codebook[codes]
    codes, shape        as above
    codebook            (2^bits) fp32
    absmax              (out, groups); or  absmax_offset + absmax_scale * absmax_codes / (2^b - 1),  where the codes of
                        b bits are dense, row after row, and consecutive groups share a scale

    float, native       compressed-tensors      factor * value(code)
    codes               weight_packed | weight  FP4 (out, in / 2) uint8, the first in the low bits | FP8 (out, in) e4m3
    scale               weight_scale            (rows of blocks, groups): a factor, or uint8: 2^(scale - 127)
    global_scale        weight_global_scale     (1): of FP4 with e4m3 scales, factor = scale / global_scale
    input_amax          input_scale | input_global_scale    (1): for a server that rounds inputs; not used here
    llama.cpp's blocks, native      factor * level(codes) + offset, as in `BLOCKS`
    codes, shape        as above
    scale, minimum      (out, blocks) fp16: factor = scale * (first + step * scale_codes), offset = -minimum *
                        minimum_codes; where there are no such codes, factor = scale and offset = minimum
    scale_codes, minimum_codes      one per sub-block, dense, row after row

    lora_a, lora_b      (rank, in), (out, rank): (alpha / rank) * lora_b @ lora_a is added, and the sum rounded again

Experts that were one 3-D tensor are linears of their own; `stacked` in `bitwright.json` says where each belongs.

A symmetric linear has no zero_point tensor: it is 2^(bits-1). Widths, group size (-1: one group per row), symmetry and
alpha of each are in `bitwright.json` (native) or in the quantization_config of `config.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

VERSION = 2
PARTS = (
    *("codes", "shape", "scale", "zero_point", "offset", "lora_a", "lora_b"),
    *("codebook", "absmax", "absmax_codes", "absmax_scale", "absmax_offset"),
    *("global_scale", "input_amax", "scale_codes", "minimum", "minimum_codes"),
)
CACHE = (".k_scale", ".v_scale")
"""Ends of the names of scales for a runtime's key-value cache, which are no part of the model."""
PACKED = {
    **{"weight": "codes", "weight_packed": "codes", "weight_scale": "scale", "weight_zero_point": "zero_point"},
    **{"weight_shape": "shape", "weight_global_scale": "global_scale"},
    **{"input_scale": "input_amax", "input_global_scale": "input_amax"},
}
"""Tensors of a linear in compressed-tensors -> the same here."""
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
BLOCKS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, int, int] | None, int | None]] = {
    "q4_0": (32, 32, tuple(range(-8, 8)), None, None),
    "q4_1": (32, 32, tuple(range(16)), None, 0),
    "q5_0": (32, 32, tuple(range(-16, 16)), None, None),
    "q5_1": (32, 32, tuple(range(32)), None, 0),
    "q8_0": (32, 32, tuple(range(-128, 128)), None, None),
    "q2_0": (64, 64, tuple(range(-1, 3)), None, None),
    "q2_k": (256, 16, tuple(range(4)), (4, 0, 1), 4),
    "q3_k": (256, 16, tuple(range(-4, 4)), (6, -32, 1), None),
    "q4_k": (256, 32, tuple(range(16)), (6, 0, 1), 6),
    "q5_k": (256, 32, tuple(range(32)), (6, 0, 1), 6),
    "q6_k": (256, 16, tuple(range(-32, 32)), (8, -128, 1), None),
    "iq4_nl": (32, 32, UNEVEN, None, None),
    "iq4_xs": (256, 32, UNEVEN, (6, -32, 1), None),
    "iq3_s": (256, 32, tuple(range(-15, 16, 2)), (4, 1, 2), None),
}
"""llama.cpp's types: weights of a block and of a sub-block, levels; bits, first and step of the codes of factors; bits
of the codes of offsets, 0 where offsets are stored as they are, None where there is none."""


def load(folder: str | Path, *, merge: bool = True, **options: Any) -> Any:
    """The model with dequantized weights; `options` go to `from_pretrained` (device_map, attn_implementation, ...).

    merge   whether low-rank corrections are added to the weights; without them it is the base of a peft adapter
    """
    import transformers  # noqa: PLC0415  (the weights alone need no transformers)

    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights that are passed are already unpacked
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if named is None or not isinstance(config, named.config_class):
        with torch.device("meta"):
            named = type(transformers.AutoModelForCausalLM.from_config(config))
    options.setdefault("dtype", config.dtype or torch.float32)
    loaded = named.from_pretrained(None, config=config, state_dict=load_weights(folder, merge=merge), **options)
    (loaded[0] if isinstance(loaded, tuple) else loaded).eval()  # with the loading info, where that is asked for
    return loaded


def load_weights(folder: str | Path, *, merge: bool = True) -> dict[str, Tensor]:
    """Every tensor of the original checkpoint by its name, quantized ones dequantized; `merge` as in `load`.

    Raises:
        ValueError: the files contradict each other; the message names the file or tensor.
    """
    folder = Path(folder)
    native = (folder / "bitwright.json").exists()
    tensors = read_tensors(folder, "weights" if native else "model")
    names = {part: part for part in PARTS} if native else PACKED
    weights = {}
    for name, linear in (native_linears(folder) if native else packed_linears(folder, tensors)).items():
        parts = {p: tensors.pop(f"{name}.{n}") for n, p in names.items() if f"{name}.{n}" in tensors}
        parts |= {} if native else unsigned(parts)
        expected = expected_parts(linear)
        if parts.keys() != expected:
            raise ValueError(f"{name}: has the tensors {sorted(parts)}; it should have {sorted(expected)}")
        weight = dequantize(name, linear, parts)
        weights[f"{name}.weight"] = corrected(weight, linear, parts) if merge and "low_rank" in linear else weight
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(CACHE)}
    return joined(tensors | weights, native_parts(folder) if native else {})


def native_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Places of linears in larger tensors of the original, by name, in `bitwright.json`."""
    description = json.loads((folder / "bitwright.json").read_text(encoding="utf-8"))
    parts: dict[str, dict[str, Any]] = description.get("parts", {})
    return parts


def joined(weights: dict[str, Tensor], parts: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The weights where parts of larger tensors are put together: `index` along the first dimension, `rows` of out."""
    by_whole: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_whole.setdefault(part["of"], []).append(name)
    for whole, names in by_whole.items():
        places = [parts[name] for name in names]
        values = [weights.pop(f"{name}.weight") for name in names]
        rows = max(max(range(*place["rows"])) for place in places) + 1
        matrix = (values[0].shape[1], rows) if places[0].get("transposed") else (rows, values[0].shape[1])
        numbers = [place["index"] for place in places if "index" in place]
        tensor = torch.empty(*((max(numbers) + 1,) if numbers else ()), *matrix, dtype=values[0].dtype)
        for place, value in zip(places, values, strict=True):
            own = tensor[place["index"]] if numbers else tensor
            (own.T if place.get("transposed") else own)[slice(*place["rows"])] = value
        if sum(value.numel() for value in values) != tensor.numel():
            raise ValueError(f"bitwright.json: the parts of {whole} do not fill it")
        weights[whole] = tensor
    return weights


def native_linears(folder: Path) -> dict[str, dict[str, Any]]:
    """Descriptions of the quantized linears in `bitwright.json`, by name."""
    description = json.loads((folder / "bitwright.json").read_text(encoding="utf-8"))
    if description.get("format") != "bitwright" or description.get("version") != VERSION:
        raise ValueError(f"bitwright.json: this loader reads version {VERSION} of the format bitwright")
    linears: dict[str, dict[str, Any]] = description["linears"]
    return linears


def packed_linears(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Descriptions of the linears with packed weights, by name, from the quantization_config of `config.json`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config["quantization_config"]
    dtype = config.get("dtype") or config.get("torch_dtype")
    by_target = {target: group for group in quantization["config_groups"].values() for target in group["targets"]}
    linears = {}
    for name in sorted(key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        group, scale = by_target.get(name, by_target.get("Linear")), tensors[f"{name}.weight_scale"]
        if group is None:
            raise ValueError(f"config.json: no group of quantization_config names {name}")
        weights, wide = group["weights"], scale.dtype.itemsize > 1
        block = weights.get("block_structure") or [1, weights.get("group_size") or -1]
        calibrated = (group["input_activations"] or {}).get("dynamic") in (False, "local")
        linears[name] = {
            "form": "affine" if weights["type"] == "int" else "float",
            "bits": weights["num_bits"],
            "group_size": block[1],
            "symmetric": weights["symmetric"],
            "scheme_name": group["format"],
            "dtype": str(scale.dtype).removeprefix("torch.") if wide else dtype,
            "input_amax": calibrated,
        }
    return linears


def unsigned(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a linear in compressed-tensors that look otherwise here."""
    codes, scale = parts.get("codes"), parts.get("scale")
    changed = {} if scale is None or scale.ndim == 2 else {"scale": scale.view(1, 1)}
    if codes is not None and codes.dtype != torch.int32:
        per_byte = 2 if codes.dtype == torch.uint8 else 1
        changed["shape"] = torch.tensor([len(codes), codes.shape[1] * per_byte])
        changed["codes"] = codes.view(torch.uint8) ^ (128 if codes.dtype == torch.int8 else 0)
    return changed


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """The stored tensors of all weight files; each must be in the file that the index names."""
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


def expected_parts(linear: dict[str, Any]) -> set[str]:
    """The tensors that a linear of this description has."""
    if linear["form"] == "affine":
        zero = set() if linear["symmetric"] else {"offset" if linear.get("offset") else "zero_point"}
        parts = {"codes", "shape", "scale"} | zero
    elif linear["form"] == "float":
        parts = {"codes", "shape", "scale"} | ({"input_amax"} if linear.get("input_amax") else set())
        parts |= {"global_scale"} if linear["scheme_name"].startswith("nvfp4") else set()
    elif linear["form"] == "blocks":
        _, _, _, scales, minimums = BLOCKS[linear["scheme_name"]]
        parts = {"codes", "shape", "scale"} | ({"scale_codes"} if scales else set())
        parts |= (set() if minimums is None else {"minimum"}) | ({"minimum_codes"} if minimums else set())
    else:
        level = {"absmax_codes", "absmax_scale", "absmax_offset"} if "absmax" in linear else {"absmax"}
        parts = {"codes", "shape", "codebook"} | level
    return parts | ({"lora_a", "lora_b"} if "low_rank" in linear else set())


def dequantize(name: str, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """The weight (out, in) of one linear, without a correction."""
    if linear["form"] == "float":
        return small_float(name, linear, parts)
    if linear["form"] == "blocks":
        return from_blocks(name, linear, parts)
    packed, bits, (rows, columns) = parts["codes"], linear["bits"], parts["shape"].tolist()
    groups = 1 if linear["group_size"] == -1 else columns // linear["group_size"]
    width = -(-columns * bits // (8 * packed.element_size()))
    by_group = [parts[suffix] for suffix in ("scale", "offset", "absmax") if suffix in parts]
    if packed.shape != (rows, width) or columns % groups or any(t.shape != (rows, groups) for t in by_group):
        raise ValueError(f"{name}: tensors of {rows} x {columns} weights do not fit {linear}")
    codes = unpack(packed, bits, columns).view(rows, groups, -1)
    value = affine(codes, linear, parts) if linear["form"] == "affine" else from_codebook(codes, linear, parts)
    return value.view(rows, columns).to(getattr(torch, linear["dtype"]))


def affine(codes: Tensor, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """scale * (codes - zero_point) or scale * codes + offset, fp32 (out, groups, columns)."""
    scale, bits = parts["scale"].float().unsqueeze(-1), linear["bits"]
    if "offset" in parts:
        return codes.float() * scale + parts["offset"].float().unsqueeze(-1)
    zero: Tensor | float = 2.0 ** (bits - 1)
    if "zero_point" in parts:
        stream, shape = parts["zero_point"], parts["scale"].shape
        in_rows = stream.dtype == torch.uint8
        points = unpack(stream.unsqueeze(0), bits, shape.numel()) if in_rows else unpack(stream.T, bits, shape[0]).T
        zero = points.float().reshape(*shape, 1)
    return (codes.float() - zero) * scale


def from_codebook(codes: Tensor, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """absmax * codebook[codes], fp32 (out, groups, columns)."""
    absmax = parts.get("absmax")
    if absmax is None:
        level = linear["absmax"]
        first = unpack(parts["absmax_codes"].unsqueeze(0), level["bits"], codes.shape[:2].numel()).view(codes.shape[:2])
        scale = parts["absmax_scale"].float().repeat_interleave(level["superblock"])[: first.numel()].view(first.shape)
        absmax = first.float() * scale * (1 / ((1 << level["bits"]) - 1)) + parts["absmax_offset"]
    values = parts["codebook"].index_select(0, codes.flatten().int()).view(codes.shape)
    weight: Tensor = values * absmax.float().unsqueeze(-1)
    return weight


def small_float(name: str, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """factor * value(code) of FP8 or FP4 codes, (out, in); a factor is of some rows and columns."""
    packed, scale, bits, (rows, columns) = parts["codes"], parts["scale"], linear["bits"], parts["shape"].tolist()
    width = columns if linear["group_size"] == -1 else linear["group_size"]
    band = rows if len(scale) == 1 else 1 if len(scale) == rows else 128
    if packed.shape != (rows, columns * bits // 8) or scale.shape != (-(-rows // band), -(-columns // width)):
        raise ValueError(f"{name}: tensors of {rows} x {columns} weights do not fit {linear}")
    if bits == 8:
        values = packed.view(torch.float8_e4m3fn).float()
    else:
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([magnitudes, -magnitudes])[unpack(packed, 4, columns).int()]
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if "global_scale" in parts:
        factor = factor / parts["global_scale"]
    factor = factor.repeat_interleave(band, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (values * factor).to(getattr(torch, linear["dtype"]))


def from_blocks(name: str, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """factor * level(code) + offset of one of llama.cpp's types, (out, in)."""
    block, columns, levels, scales, minimums = BLOCKS[linear["scheme_name"]]
    packed, bits, (rows, width) = parts["codes"], (len(levels) - 1).bit_length(), parts["shape"].tolist()
    halves = [parts[suffix] for suffix in ("scale", "minimum") if suffix in parts]
    if packed.shape != (rows, width * bits // 8) or any(t.shape != (rows, width // block) for t in halves):
        raise ValueError(f"{name}: tensors of {rows} x {width} weights do not fit {linear}")

    def of_sub_blocks(half: str, suffix: str, bits: int, first: int, step: int) -> Tensor:
        count = rows * (width // columns)
        codes = unpack(parts[suffix].unsqueeze(0), bits, count).view(rows, -1).float()
        return parts[half].float().repeat_interleave(block // columns, 1) * (codes * step + first)

    values = torch.tensor(levels, dtype=torch.float32)[unpack(packed, bits, width).int()].view(rows, -1, columns)
    factor = of_sub_blocks("scale", "scale_codes", *scales) if scales else parts["scale"].float()
    weight = values * factor.unsqueeze(-1)
    if minimums is not None:
        offset = -of_sub_blocks("minimum", "minimum_codes", minimums, 0, 1) if minimums else parts["minimum"].float()
        weight = weight + offset.unsqueeze(-1)
    return weight.view(rows, width).to(getattr(torch, linear["dtype"]))


def corrected(weight: Tensor, linear: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """The weight plus its low-rank correction, rounded to the weight's dtype."""
    scaling: float = linear["low_rank"]["alpha"] / linear["low_rank"]["rank"]
    return (weight.float() + (parts["lora_b"].float() @ parts["lora_a"].float()) * scaling).to(weight.dtype)


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
