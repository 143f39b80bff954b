"""The quantized checkpoints that are read, by `quant_method` of config.json, and the way out of the others.

A checkpoint is judged by its configuration first (`read_method`, before any weight is fetched), then by the headers of
its files (`read_quantized`): its logical tensors are the weights that its codes mean, and whatever is stored as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.domain.inputs.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from app.domain.inputs.quantized.stored import QuantizedTensor, Reading, Stored, corrupt
from app.domain.inputs.quantized_tensors import HINT, quantized_tensor
from bitwright.errors import UnsupportedArchitecture

Reader = Callable[[Reading], Iterator[QuantizedTensor]]
READERS: Mapping[str, tuple[str, Reader]] = MappingProxyType(
    {
        "fp8": ("FP8", fp8.weights),
        "fbgemm_fp8": ("FP8", fp8.weights),
        "mxfp4": ("MXFP4", mxfp4.weights),
        "compressed-tensors": ("compressed-tensors", compressed_tensors.weights),
        "gptq": ("GPTQ", gptq.weights),
        "awq": ("AWQ", awq.weights),
        "bitsandbytes": ("bitsandbytes", bitsandbytes.weights),
    }
)
"""`quant_method` -> what people call it, and who reads it."""
MLX = "mlx"
UNREAD: Mapping[str, str] = MappingProxyType(
    {
        "modelopt": "ModelOpt's layouts: convert it with llm-compressor's ModelOptNvfp4Converter to compressed-tensors",
        "torchao": "torchao's layouts: load it with transformers, dequantize() it and save it in bfloat16",
        "hqq": "HQQ's layouts: dequantize it with the hqq library and save it in bfloat16",
        "exl2": "ExLlamaV2's layouts: give the model that it was made from",
        "exl3": "ExLlamaV3's layouts: give the model that it was made from",
        "auto-round": "auto-round's layouts: export it with --format auto_gptq or llm_compressor",
        MLX: "MLX's layouts: give the model that it was converted from, or dequantize it with mlx_lm.convert -d",
    }
)
"""`quant_method` -> layouts that are not read, and the way out."""
LEFT_BEHIND = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".activation_scale_inv",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".prob_scale",
    ".kv_scale",
    ".weight_format",
    ".weight_shape",
)
"""Ends of names of tensors that describe activations, caches, or a layout that was read; they are not the model's."""


@dataclass(frozen=True)
class QuantizedSource:
    """A quantized checkpoint, understood.

    what      words for people: the kind, and how wide its codes are
    weights   logical name -> how the weight is stored
    kept      stored names of the tensors that are as they are
    """

    what: str
    weights: Mapping[str, QuantizedTensor]
    kept: tuple[str, ...]


def read_method(config: Mapping[str, object]) -> str | None:
    """`quant_method` of a configuration, decoded; None if it says of no quantization.

    Raises:
        UnsupportedArchitecture: the checkpoint is quantized in a way that is not read.
    """
    settings = config.get("quantization_config")
    mlx = config.get("quantization")
    if settings is None and isinstance(mlx, Mapping) and "bits" in mlx:
        settings = {"quant_method": MLX}
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if isinstance(settings, Mapping) and method is None and ("load_in_4bit" in settings or "load_in_8bit" in settings):
        method = "bitsandbytes"  # as transformers takes it where older releases left the method out
    if isinstance(method, str) and method in READERS:
        return method
    way_out = UNREAD.get(method) if isinstance(method, str) else None
    known = ", ".join(READERS)
    where = "MLX's quantization" if method == MLX else f"a quantization_config with quant_method {method!r}"
    detail = (
        f"config.json has {where}: the checkpoint is quantized already, in a way that is not read. Read are {known}"
    )
    hint = HINT if way_out is None else way_out
    raise UnsupportedArchitecture(detail, field="model", value=method, hint=hint)


def quantized_warning(what: str) -> str:
    """The warning of whoever quantizes a quantized source anew."""
    return (
        f"the source is {what}: its weights are read as the numbers that they mean, and quantizing them anew adds to "
        "the error that they have already; the model that it was made from gives a better result"
    )


def read_quantized(
    config: Mapping[str, object], entries: Mapping[str, Stored], small: Callable[[str], bytes]
) -> QuantizedSource | None:
    """Logical tensors of a checkpoint, by the headers of its files; None if nothing in it is quantized.

    config    config.json, decoded
    entries   stored name -> header's entry
    small     content of a stored tensor of a few bytes

    Raises:
        UnsupportedArchitecture, UnsupportedCheckpoint: it is quantized in a way that is not read.
        CorruptCheckpoint: counts, shapes or dtypes contradict each other.
    """
    method = read_method(config)
    settings = config.get("quantization_config")
    if method is None or not isinstance(settings, Mapping):
        _demand_plain((name, entry.dtype) for name, entry in entries.items())
        return None
    title, reader = READERS[method]
    weights: dict[str, QuantizedTensor] = {}
    for weight in reader(Reading(settings, entries, small)):
        if weight.name in weights:
            raise corrupt(weight.name, "is stored twice, in two ways")
        weights[weight.name] = weight
    taken = {part for weight in weights.values() for part in weight.parts.values()}
    kept = [name for name in entries if name not in taken and not _is_left_behind(name, weights)]
    for name in kept:
        if name in weights:
            raise corrupt(name, "is stored twice, as it is and quantized")
    over = quantized_tensor((name, entries[name].dtype) for name in kept)
    if over is not None:
        raise corrupt(over[0], f"is {over[1]}, and belongs to no weight that {title} describes")
    return QuantizedSource(_words(title, weights), weights, tuple(kept))


def _demand_plain(tensors: Iterator[tuple[str, str]]) -> None:
    quantized = quantized_tensor(tensors)
    if quantized is not None:
        detail = (
            f"the checkpoint is quantized already: {quantized[0]} is {quantized[1]}, and config.json has no "
            "quantization_config that says how"
        )
        raise UnsupportedArchitecture(detail, field="model", value=quantized[0], hint=HINT)


def _is_left_behind(name: str, weights: Mapping[str, QuantizedTensor]) -> bool:
    if name.endswith(LEFT_BEHIND):
        return True
    if name.partition(bitsandbytes.STATE)[0] in weights and bitsandbytes.STATE in name:
        return True
    module, _, leaf = name.rpartition(".")
    weight = weights.get(f"{module}.weight")
    if weight is None:
        return False
    if weight.kind == compressed_tensors.DECOMPRESSED and leaf in ("weight_scale", "weight_global_scale"):
        return True
    # Parts that a weight's arithmetic does without, as GPTQ's order where groups are in order.
    return leaf in ("g_idx", "weight_g_idx", "qzeros", "weight_zero_point")


def _words(title: str, weights: Mapping[str, QuantizedTensor]) -> str:
    """The kind, with the widths and groups of most weights."""
    told: dict[str, int] = {}
    for weight in weights.values():
        parts = [f"{weight.number('bits')} bits"] if "bits" in weight.numbers else []
        group = weight.numbers.get("group")
        parts += [f"groups of {int(group)}"] if group and int(group) not in weight.shape else []
        words = f"{title} ({', '.join(parts)})" if parts else title
        told[words] = told.get(words, 0) + 1
    return max(told, key=lambda words: told[words], default=title)
