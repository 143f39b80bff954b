"""The model types that can be quantized, and what a checkpoint's `config.json` and headers say about shapes.

A type is accepted when block by block gives the logits of the whole model on a tiny configuration of it:
`make test-architectures` proves it and writes `accepted_architectures.json`. For decoders of the Llama shape the inputs
and outputs of all linears follow from a few numbers of the configuration, so that a group size is checked when a job is
posted, without torch and without weights. For all others the headers of the weights tell about how many there are.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType

from app.domain.inputs.config_numbers import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH, check_numbers
from app.domain.inputs.left_alone import left_alone
from app.domain.inputs.quantized.registry import read_method
from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture

HEAD = "lm_head"
"""Full module name of the output head, in all architectures."""
EMBEDDINGS = "model.embed_tokens"
"""Full module name of the embeddings, in those of the Llama shape."""
ACCEPTED_FILE = Path(__file__).with_name("accepted_architectures.json")


@dataclass(frozen=True)
class Architecture:
    """An accepted `model_type`.

    model_class   transformers' class
    refusals      formats that hold no checkpoint of it, by name, and why
    known_shapes  whether the shapes of its linears follow from `Dimensions`
    defaults      what transformers assumes where config.json is silent
    """

    model_type: str
    title: str
    model_class: str
    refusals: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    known_shapes: bool = False
    blocks: str = "model.layers"
    defaults: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


GEMMA3_DEFAULTS: MappingProxyType[str, int] = MappingProxyType(
    {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208}
)
LLAMA_SHAPE: MappingProxyType[str, Mapping[str, int]] = MappingProxyType(
    {
        "llama": MappingProxyType({}),
        "mistral": MappingProxyType({}),
        "qwen2": MappingProxyType({}),
        "qwen3": MappingProxyType({"head_dim": 128}),
        "gemma3_text": GEMMA3_DEFAULTS,
    }
)
"""Types whose linears' shapes follow from `Dimensions`, and what transformers assumes where config.json is silent."""


def _accepted() -> tuple[dict[str, Architecture], dict[str, str]]:
    """The generated file: accepted types, and reasons why others are not."""
    stored = json.loads(ACCEPTED_FILE.read_text(encoding="utf-8"))
    accepted = {
        name: Architecture(
            name,
            row["title"],
            row["class"],
            MappingProxyType(row.get("refusals", {})),
            known_shapes=name in LLAMA_SHAPE,
            defaults=LLAMA_SHAPE.get(name, {}),
        )
        for name, row in stored["types"].items()
    }
    return accepted, stored["refused"]


_TYPES, _REFUSED = _accepted()
ARCHITECTURES: MappingProxyType[str, Architecture] = MappingProxyType(_TYPES)
REFUSED: MappingProxyType[str, str] = MappingProxyType(_REFUSED)
"""Types that are known and not accepted, and why."""


@dataclass(frozen=True)
class Dimensions:
    """The numbers of a configuration that decide the shapes of its linears.

    shapes   by name, where they are read from the weights' headers: names are then those of the files, not of modules
    """

    architecture: Architecture
    layers: int
    hidden: int
    vocabulary: int
    tied_embeddings: bool
    intermediate: int = 0
    heads: int = 0
    key_value_heads: int = 0
    head_dim: int = 0
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def exact(self) -> bool:
        """True if `linears` has every linear by its module's name."""
        return self.architecture.known_shapes

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """Name in the largest block -> (out_features, in_features), in the order of the forward pass."""
        if not self.exact:
            return self._largest_block()
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
        if not self.exact:
            return dict(self.shapes)
        return {
            f"{self.architecture.blocks}.{layer}.{name}": shape
            for layer in range(self.layers)
            for name, shape in self.block_linears().items()
        }

    @property
    def block_weights(self) -> int:
        """Of all blocks' linears."""
        return sum(map(prod, self.linears().values()))

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    def _largest_block(self) -> dict[str, tuple[int, int]]:
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for name, shape in self.shapes.items():
            number = BLOCK.search(name)
            if number is not None:
                blocks.setdefault(number[1], {})[name[number.end() :]] = shape
        return max(blocks.values(), key=lambda block: sum(map(prod, block.values())), default={})


def read_dimensions(
    config: Mapping[str, object], tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> Dimensions:
    """The shapes that a decoded `config.json` promises, or that the weights' headers show.

    tensors   shape of every stored tensor by name

    Raises:
        UnsupportedArchitecture: `model_type` is not in `ARCHITECTURES`.
        CorruptCheckpoint: a number is missing, not a whole number, or out of any sensible range.
    """
    architecture = find_architecture(config)
    check_numbers(config)
    if not architecture.known_shapes:
        return _dimensions_of_headers(architecture, config, tensors)
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


BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""The number of a block in a stored name."""
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
MATRIX, EXPERTS = 2, 3
"""Dimensions of a linear's weight, and of the weights of all experts of a block."""


def _dimensions_of_headers(
    architecture: Architecture, config: Mapping[str, object], tensors: Mapping[str, tuple[int, ...]]
) -> Dimensions:
    """Roughly: every matrix of a block that is not left alone counts as a linear, and so do all experts together."""
    parts = [part for name in TEXT_CONFIGS if isinstance(part := config.get(name), Mapping)]
    text: Mapping[str, object] = parts[0] if parts else config

    def number(*names: str) -> int:
        found = next((value for name in names if isinstance(value := text.get(name), int)), 0)
        return 0 if isinstance(found, bool) else found

    shapes = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        is_expert = len(shape) == EXPERTS and "experts" in module
        if BLOCK.search(name) and not left_alone(module) and (is_expert or (len(shape) == MATRIX and module != name)):
            shapes[module] = (prod(shape[:-1]), shape[-1])
    return Dimensions(
        architecture=architecture,
        layers=number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=number("hidden_size", "n_embd", "d_model"),
        vocabulary=number("vocab_size"),
        tied_embeddings="lm_head.weight" not in tensors,
        shapes=MappingProxyType(shapes),
    )


def find_architecture(config: Mapping[str, object]) -> Architecture:
    """The accepted type of a decoded `config.json`.

    Raises:
        UnsupportedArchitecture: it is not accepted, or the checkpoint is quantized in a way that is not read.
    """
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        reason = f" ({REFUSED[str(model_type)]})" if str(model_type) in REFUSED else ""
        detail = f"config.json has model_type {model_type!r}{reason}; supported are: {', '.join(ARCHITECTURES)}"
        hint = "choose a model of one of these types (GET /v1/architectures)"
        raise UnsupportedArchitecture(detail, field="model", value=model_type, hint=hint)
    read_method(config)
    return architecture


def is_accepted(config: Mapping[str, object]) -> bool:
    """True if the `model_type` of a decoded `config.json` is an accepted one."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in ARCHITECTURES


def _number(values: Mapping[str, object], name: str, limit: int) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        detail = f"config.json has {name} = {value!r}; it must be a whole number from 1 to {limit}"
        raise CorruptCheckpoint(detail, field=name, value=value)
    return value
