"""Load a packed Bitwright checkpoint (GPTQ, AWQ, MLX, bitsandbytes) into transformers, by torch alone.

    from load_packed import load
    model = load("path/to/checkpoint")          # a transformers model with ordinary floating-point weights

or, to see only the weights:    python load_packed.py path/to/checkpoint

A quantized linear stands for the weight below, computed in fp32 and rounded once to the model's dtype:

    gptq            scales * (codes - zeros)        qweight int32 (inputs packed, out), qzeros (groups, out
                                                    packed), scales (groups, out); in gptq's first form zeros less one
    awq             scales * (codes - zeros)        qweight int32 (in, out packed), in the order 0 2 4 6 1 3 5 7
    mlx             scales * codes + biases         weight uint32 (out, inputs packed), scales and biases (out, groups);
                                                    mxfp4, mxfp8: 2^(scales - 127) times FP4 or FP8 numbers
    bitsandbytes    absmax * quant_map[codes]       two codes a byte, the first in its high half; absmax by block, or
                                                    nested_quant_map[absmax] * nested_absmax + offset

Codes are dense, lowest bit first. Widths are in `config.json`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

STATE = ".quant_state.bitsandbytes__nf4"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, from the lowest bits, of each of eight consecutive outputs."""


def load(folder: str | Path, **options: Any) -> Any:
    """The model with dequantized weights; `options` go to `from_pretrained` (device_map, attn_implementation, ...)."""
    import transformers  # noqa: PLC0415  (the weights alone need no transformers)

    config = transformers.AutoConfig.from_pretrained(folder)
    for field in ("quantization_config", "quantization"):
        if hasattr(config, field):
            delattr(config, field)  # the weights that are passed are already unpacked
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if named is None or not isinstance(config, named.config_class):
        with torch.device("meta"):
            named = type(transformers.AutoModelForCausalLM.from_config(config))
    options.setdefault("dtype", config.dtype or torch.float32)
    return named.from_pretrained(None, config=config, state_dict=load_weights(folder), **options).eval()


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of the original checkpoint by its name, quantized ones dequantized.

    Raises:
        ValueError: the files contradict each other; the message names the file or tensor.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(folder)
    settings = config.get("quantization_config") or {"quant_method": "mlx", **config.get("quantization", {})}
    method = settings["quant_method"]
    if method not in READERS:
        raise ValueError(f"config.json: quant_method {method!r} is none of {', '.join(READERS)}")
    ending, suffixes, dequantize = READERS[method]
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    weights = {}
    for name in sorted(key.removesuffix(ending) for key in tensors if key.endswith(ending)):
        parts = {suffix: tensors.pop(name + suffix) for suffix in suffixes if name + suffix in tensors}
        try:
            weights[f"{name}.weight"] = dequantize(name, parts, settings).to(dtype)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{name}: its tensors are missing or do not fit: {error}") from error
    return tensors | weights


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The stored tensors of all weight files; each must be in the file that the index names."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())) if where else ["model.safetensors"]:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {file!r}, which is not a weight file in the same folder")
        with safe_open(folder / file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    return tensors


def gptq(name: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """GPTQ's words to fp32 (out, in)."""
    bits = rule(name, settings)["bits"]
    words, scales = parts[".qweight"], parts[".scales"].float().T
    codes = unpack(words.T.contiguous(), bits, words.shape[0] * 32 // bits)
    zeros = unpack(parts[".qzeros"], bits, len(scales)).T + (settings["checkpoint_format"] == "gptq")
    return grouped(codes, scales, zeros.float())


def awq(_name: str, parts: dict[str, Tensor], _settings: dict[str, Any]) -> Tensor:
    """AWQ's words to fp32 (out, in)."""

    def ordered(words: Tensor) -> Tensor:
        codes = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
        return codes[..., list(AWQ_ORDER)].flatten(1).T

    return grouped(ordered(parts[".qweight"]), parts[".scales"].float().T, ordered(parts[".qzeros"]).float())


def mlx(name: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """MLX's words to fp32 (out, in)."""
    words, scales, own = parts[".weight"], parts[".scales"], settings.get(name, settings)
    bits, mode = own["bits"], own.get("mode", "affine")
    codes = unpack(words, bits, words.shape[1] * 32 // bits).view(*scales.shape, -1)
    if mode in ("mxfp4", "mxfp8"):
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        small = torch.cat([magnitudes, -magnitudes])
        values = small[codes.int()] if mode == "mxfp4" else codes.view(torch.float8_e4m3fn).float()
        return (values * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(1)
    biases = parts[".biases"]
    return (codes.float() * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(1)


def nf4(_name: str, parts: dict[str, Tensor], _settings: dict[str, Any]) -> Tensor:
    """bitsandbytes' bytes to fp32 (out, in)."""
    state = json.loads(bytes(parts[".weight" + STATE].tolist()))
    octets, absmax = parts[".weight"].flatten(), parts[".weight.absmax"]
    codes = torch.stack((octets >> 4, octets & 15), dim=-1).flatten()
    if "nested_offset" in state:
        second = parts[".weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = parts[".weight.nested_quant_map"][absmax.int()] * second + state["nested_offset"]
    scale = absmax.repeat_interleave(state["blocksize"])
    return (parts[".weight.quant_map"][codes.int()] * scale).view(state["shape"])


def grouped(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """scales * (codes - zeros), fp32 (out, in), of scales and zeros (out, groups)."""
    by_group = codes.float().reshape(*scales.shape, -1)
    return ((by_group - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1)


def rule(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """GPTQ's settings of one linear: those of the first pattern that its name matches, over the checkpoint's."""
    for pattern, own in settings.get("dynamic", {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            return {**settings, **own}
    return settings


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Little-endian words (rows, any) -> the first `count` codes of each row, uint8."""
    octets = stream.contiguous().flatten().view(torch.uint8).view(len(stream), -1)
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


WORDS = (".qweight", ".qzeros", ".scales", ".g_idx")
NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
READERS = {
    "gptq": (".qweight", WORDS, gptq),
    "awq": (".qweight", WORDS, awq),
    "mlx": (".scales", (".weight", ".scales", ".biases"), mlx),
    "bitsandbytes": (
        ".weight" + STATE,
        (".weight", ".weight.absmax", ".weight.quant_map", *NESTED, ".weight" + STATE),
        nf4,
    ),
}
"""quant_method -> the tensor by which a linear is known, all that it may have, and the arithmetic."""

if __name__ == "__main__":
    for tensor_name, tensor in sorted(load_weights(sys.argv[1]).items()):
        print(f"{tensor_name}  {tuple(tensor.shape)}  {tensor.dtype}")  # noqa: T201
