"""config.json of the model in a GGUF file, from its metadata: llama.cpp's names and numbers as transformers has them.

A file says what llama.cpp does not know by the architecture. What it leaves unsaid is that of the architecture's
models: Gemma's scale of attention, the activation, the pattern of windows. Scaling of rotary frequencies is read where
a configuration can say it exactly, and refused otherwise. Read in transformers 5.23 (`integrations/ggml.py`), which
leaves scaling out, and llama.cpp (`src/llama-model.cpp`, `convert_hf_to_gguf.py`).
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.domain.inputs.quantized.gguf_header import GgufHeader
from app.domain.inputs.quantized.stored import corrupt, whole
from bitwright.errors import UnsupportedCheckpoint

Config = dict[str, object]
MOST = 1 << 24


@dataclass(frozen=True)
class GgufModel:
    """An architecture of llama.cpp as a `model_type` of transformers.

    architectures   the class, as config.json names it
    epsilon         the field of the norms' epsilon
    layer_norm      whether norms subtract the mean
    fields          further keys of the metadata, without the architecture -> fields
    constants       fields that a file does not say
    partial         whether heads may be turned in part
    """

    model_type: str
    architectures: str
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    fields: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    constants: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    partial: bool = False


COMMON: Mapping[str, str] = MappingProxyType(
    {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
    }
)
EXPERTS: Mapping[str, str] = MappingProxyType(
    {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
)
SHARED = MappingProxyType({**EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"})
MODELS: Mapping[str, GgufModel] = MappingProxyType(
    {
        "llama": GgufModel("llama", "LlamaForCausalLM"),
        "qwen2": GgufModel("qwen2", "Qwen2ForCausalLM"),
        "qwen2moe": GgufModel("qwen2_moe", "Qwen2MoeForCausalLM", fields=SHARED),
        "qwen3": GgufModel("qwen3", "Qwen3ForCausalLM"),
        "qwen3moe": GgufModel(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            fields=EXPERTS,
            constants=MappingProxyType({"norm_topk_prob": True}),
        ),
        "gemma2": GgufModel("gemma2", "Gemma2ForCausalLM"),
        "gemma3": GgufModel("gemma3_text", "Gemma3ForCausalLM"),
        "phi3": GgufModel("phi3", "Phi3ForCausalLM", partial=True),
        "starcoder2": GgufModel("starcoder2", "Starcoder2ForCausalLM", "norm_epsilon", layer_norm=True),
        "stablelm": GgufModel("stablelm", "StableLmForCausalLM", "layer_norm_eps", layer_norm=True, partial=True),
        "nemotron": GgufModel("nemotron", "NemotronForCausalLM", "norm_eps", layer_norm=True, partial=True),
    }
)
"""`general.architecture` -> the model."""
GEMMA = frozenset({"gemma2", "gemma3"})
WINDOWED = GEMMA | {"phi3"}
NARROW_SCALE = MappingProxyType({"gemma2": 46, "gemma3": 62})
"""Blocks of the models whose attention is scaled by hidden_size / heads, not by head_dim, as llama.cpp tells them."""
IDS = MappingProxyType(
    {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
)
LLAMA3_SHAPES = (8192, 16384, 32768)
"""Contexts before scaling that Llama 3's rule is tried with; a file holds its factors, not its numbers."""


def gguf_model(header: GgufHeader) -> GgufModel:
    """The architecture of a file.

    Raises:
        UnsupportedCheckpoint: it is not read.
    """
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        detail = f"the GGUF file is one of {parts} parts"
        hint = "merge them: llama-gguf-split --merge first-part.gguf model.gguf"
        raise UnsupportedCheckpoint(detail, field="model", value=parts, hint=hint)
    name = header.metadata.get("general.architecture")
    model = MODELS.get(name) if isinstance(name, str) else None
    if model is None or (name == "llama" and header.metadata.get("llama.expert_count")):
        detail = (
            f"the GGUF file is of the architecture {name!r}; read are {', '.join(MODELS)}, without experts in llama"
        )
        hint = "give the model that it was made from, as safetensors (the repository without -GGUF)"
        raise UnsupportedCheckpoint(detail, field="model", value=str(name), hint=hint)
    return model


def gguf_words(header: GgufHeader) -> str:
    """The file in words: its types, those of most numbers first."""
    numbers: dict[str, int] = {}
    for entry in header.tensors.values():
        numbers[entry.dtype] = numbers.get(entry.dtype, 0) + math.prod(entry.shape)
    return f"a GGUF file ({', '.join(sorted(numbers, key=lambda kind: (-numbers[kind], kind)))})"


def gguf_config(header: GgufHeader, content: Callable[[str], bytes]) -> Config:
    """The configuration, as config.json has it.

    content   bytes of a small tensor of the file

    Raises:
        UnsupportedCheckpoint: the architecture, or the scaling of its rotary embedding, is not read.
        CorruptCheckpoint: a number is missing or out of any sensible range.
    """
    model, architecture = gguf_model(header), str(header.metadata["general.architecture"])
    keys = _Keys(header, architecture)
    config: Config = {"architectures": [model.architectures], "model_type": model.model_type}
    config |= {name: keys.whole(key) for key, name in {**COMMON, **model.fields}.items()}
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", keys.whole("rope.dimension_count", hidden // heads or 1))
    if model.partial:
        head_dim = keys.whole("attention.key_length", hidden // heads or 1)
    norm = "attention.layer_norm_epsilon" if model.layer_norm else "attention.layer_norm_rms_epsilon"
    config |= {
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        model.epsilon: keys.number(norm),
        "vocab_size": _vocabulary(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dtype(header),
        **model.constants,
        **_biases(architecture, header),
        **_rotary(keys, header, content, head_dim, partial=model.partial),
    }
    if architecture in GEMMA:
        narrow = NARROW_SCALE[architecture] == config["num_hidden_layers"]
        config["query_pre_attn_scalar"] = hidden // heads if narrow else head_dim
    if architecture in WINDOWED and f"{architecture}.attention.sliding_window" in header.metadata:
        config["sliding_window"] = keys.whole("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if f"{architecture}.{key}" in header.metadata:
            config[key] = keys.number(key)
    for key, name in IDS.items():
        token = header.metadata.get(f"tokenizer.ggml.{key}")
        config[name] = token if isinstance(token, int) else None
    return config


@dataclass(frozen=True)
class _Keys:
    """Numbers of the metadata under the architecture's name."""

    header: GgufHeader
    architecture: str

    def whole(self, key: str, default: int | None = None) -> int:
        name = f"{self.architecture}.{key}"
        value = self.header.metadata.get(name, default)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]  # the same for every block
        return whole(value, name, 1, MOST)

    def number(self, key: str, default: float | None = None) -> float:
        name = f"{self.architecture}.{key}"
        value = self.header.metadata.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise corrupt(name, f"is {value!r}; it must be a positive number")
        # Stored in fp32: the shortest decimal that is the same number there.
        return float(f"{value:.7g}") if struct.pack("<f", float(f"{value:.7g}")) == struct.pack("<f", value) else value


def _vocabulary(header: GgufHeader) -> int:
    entry = header.tensors.get("token_embd.weight")
    if entry is None or len(entry.shape) != 2:
        raise corrupt("token_embd.weight", "is missing, or no matrix")
    return whole(entry.shape[0], "token_embd.weight's rows", 1, MOST)


def _dtype(header: GgufHeader) -> str:
    """The dtype of the weights: a file's own where it holds plain numbers, else bfloat16."""
    kinds = {entry.dtype for entry in header.tensors.values()}
    if kinds <= {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _biases(architecture: str, header: GgufHeader) -> Config:
    """Fields that say which linears have biases, as the tensors show it."""

    def has(name: str) -> bool:
        return f"blk.0.{name}.bias" in header.tensors

    if architecture == "llama":
        return {"attention_bias": has("attn_q"), "mlp_bias": has("ffn_up")}
    if architecture == "starcoder2":
        return {"use_bias": has("attn_q")}
    if architecture == "stablelm":
        parallel = "blk.0.ffn_norm.weight" not in header.tensors
        return {"use_qkv_bias": has("attn_q"), "use_parallel_residual": parallel}
    if architecture == "nemotron":
        return {"attention_bias": has("attn_q"), "mlp_bias": has("ffn_up")}
    return {"attention_bias": has("attn_q")} if architecture in ("qwen3", "qwen3moe", *GEMMA) else {}


def _rotary(
    keys: _Keys, header: GgufHeader, content: Callable[[str], bytes], head_dim: int, *, partial: bool
) -> Config:
    found: Config = {"rope_theta": keys.number("rope.freq_base", 10_000.0)}
    turned = keys.whole("rope.dimension_count", head_dim)
    if partial:
        found["partial_rotary_factor"] = turned / head_dim
    elif turned != head_dim:
        raise _unscaled(f"{keys.architecture}.rope.dimension_count is {turned}, and heads are {head_dim} wide")
    kind = header.metadata.get(f"{keys.architecture}.rope.scaling.type", "none")
    if any(name.startswith("rope_factors_") for name in header.tensors):
        raise _unscaled("it has factors of the rotary embedding for long and short texts")
    if "rope_freqs.weight" in header.tensors:
        found["rope_scaling"] = _llama3(header, content, float(str(found["rope_theta"])), head_dim)
    elif kind in ("linear", "yarn"):
        factor = keys.number("rope.scaling.factor")
        scaling: Config = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
        found["rope_scaling"] = scaling
    elif kind != "none":
        raise _unscaled(f"its rotary embedding is scaled by {kind!r}")
    elif f"{keys.architecture}.rope.scaling.factor" in header.metadata:
        found["rope_scaling"] = {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    return found


def _unscaled(detail: str) -> UnsupportedCheckpoint:
    hint = "give the model that it was made from, as safetensors (the repository without -GGUF)"
    return UnsupportedCheckpoint(f"the GGUF file cannot be said in config.json: {detail}", field="model", hint=hint)


def _llama3(header: GgufHeader, content: Callable[[str], bytes], theta: float, head_dim: int) -> Config:
    """Llama 3's scaling whose factors are the file's, to fp32's precision.

    Raises:
        UnsupportedCheckpoint: the factors are of no such scaling.
    """
    entry = header.tensors["rope_freqs.weight"]
    half = head_dim // 2
    if entry.dtype != "F32" or entry.shape != (half,):
        raise corrupt("rope_freqs.weight", f"is {entry.dtype} of shape {entry.shape}; heads need F32 of ({half},)")
    factors = struct.unpack(f"<{half}f", content("rope_freqs.weight"))
    factor = max(factors)
    for context in LLAMA3_SHAPES:
        wanted = _llama3_factors(theta, half, factor, context)
        if all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(factors, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise _unscaled("rope_freqs.weight is not of Llama 3's scaling from a context of 8192, 16384 or 32768")


def _llama3_factors(theta: float, half: int, factor: float, context: int) -> list[float]:
    """Divisor of each rotary frequency, as `workers.formats.gguf.metadata` writes them."""
    found = []
    for index in range(half):
        turns = context * theta ** (-index / half) / (2 * math.pi)
        kept = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
        found.append(1 / ((1 - kept) / factor + kept))
    return found
