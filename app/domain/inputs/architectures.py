"""The model architectures that can be quantized, and what their `config.json` says about shapes.

All of them are decoders of the Llama shape: a block has seven linears, and their inputs and outputs follow from a few
numbers of the configuration. So a group size is checked when a job is posted, without torch and without weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from app.domain.inputs.quantized_tensors import HINT
from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture

HEAD = "lm_head"
"""Full module name of the output head, in all architectures."""
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 1024, 1 << 20, 1 << 24
"""Far above any published model: a configuration beyond them is damaged or hostile, and never sizes a buffer."""


SHARED_INPUTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Linears of a block that read the same input, which runtimes join into one: a budget gives them one width."""


@dataclass(frozen=True)
class Architecture:
    """A supported `model_type`.

    blocks    full module name of the list of decoder blocks
    defaults  what transformers assumes where config.json is silent
    """

    model_type: str
    title: str
    blocks: str = "model.layers"
    defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


GEMMA3_DEFAULTS: MappingProxyType[str, int] = MappingProxyType(
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208}
)

ARCHITECTURES: MappingProxyType[str, Architecture] = MappingProxyType(
    {
        architecture.model_type: architecture
        for architecture in (
            Architecture("llama", "Llama (SmolLM2, TinyLlama and others of its shape)"),
            Architecture("mistral", "Mistral"),
            Architecture("qwen2", "Qwen2 and Qwen2.5"),
            Architecture("qwen3", "Qwen3", defaults=MappingProxyType({"head_dim": 128})),
            Architecture("gemma3_text", "Gemma 3, text only", defaults=GEMMA3_DEFAULTS),
        )
    }
)


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a configuration that decide the shapes of its linears."""

    architecture: Architecture
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied_embeddings: bool

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """Name inside a block -> (out_features, in_features), in the order of the forward pass."""
        attention, key_value = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (attention, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, attention),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full module name -> (out_features, in_features) of every linear in the decoder blocks."""
        return {
            f"{self.architecture.blocks}.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in self.block_linears().items()
        }


def read_dimensions(config: Mapping[str, object]) -> Dimensions:
    """The shapes that a decoded `config.json` promises.

    Raises:
        UnsupportedArchitecture: `model_type` is not in `ARCHITECTURES`.
        CorruptCheckpoint: a number is missing, not a whole number, or out of any sensible range.
    """
    architecture = find_architecture(config)
    values = {**architecture.defaults, **{key: value for key, value in config.items() if value is not None}}
    heads = _number(values, "num_attention_heads", MAX_WIDTH)
    hidden = _number(values, "hidden_size", MAX_WIDTH)
    values = {"num_key_value_heads": heads, "head_dim": hidden // heads} | values
    return Dimensions(
        architecture=architecture,
        layers=_number(values, "num_hidden_layers", MAX_LAYERS),
        hidden=hidden,
        intermediate=_number(values, "intermediate_size", MAX_WIDTH),
        heads=heads,
        key_value_heads=_number(values, "num_key_value_heads", MAX_WIDTH),
        head_dim=_number(values, "head_dim", MAX_WIDTH),
        vocabulary=_number(values, "vocab_size", MAX_VOCABULARY),
        tied_embeddings=bool(values.get("tie_word_embeddings", architecture.model_type == "gemma3_text")),
    )


def find_architecture(config: Mapping[str, object]) -> Architecture:
    """The table's entry for a decoded `config.json`.

    Raises:
        UnsupportedArchitecture: the table has none, or the checkpoint is quantized already.
    """
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        detail = f"config.json has model_type {model_type!r}; supported are: {known}"
        raise UnsupportedArchitecture(
            detail, field="model", value=model_type, hint="choose a model of one of these types"
        )
    check_not_quantized(config)
    return architecture


def is_accepted(config: Mapping[str, object]) -> bool:
    """True if the table has the `model_type` of a decoded `config.json`."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in ARCHITECTURES


def check_not_quantized(config: Mapping[str, object]) -> None:
    """Check that a decoded `config.json` does not say that its weights are quantized.

    Raises:
        UnsupportedArchitecture: it does.
    """
    if config.get("quantization_config") is not None:
        detail = "config.json has a quantization_config: the checkpoint is quantized already"
        raise UnsupportedArchitecture(detail, field="model", hint=HINT)
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping) and "bits" in mlx:
        detail = "config.json has MLX's quantization: the checkpoint is quantized already"
        raise UnsupportedArchitecture(detail, field="model", hint=HINT)


def _number(values: Mapping[str, object], name: str, limit: int) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        detail = f"config.json has {name} = {value!r}; it must be a whole number from 1 to {limit}"
        raise CorruptCheckpoint(detail, field=name, value=value)
    return value
