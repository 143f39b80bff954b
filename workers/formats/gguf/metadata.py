"""The architecture of a checkpoint as GGUF metadata: numbers, names, and what llama.cpp wants otherwise.

What a model type needs is its row in `workers.formats.gguf.architectures`; here it meets a checkpoint. Numbers that
config.json leaves out are those that transformers assumes. Models that a file cannot describe are refused by the rules
of `app.domain.gguf`, applied here to the configuration as transformers completes it.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from app.domain.gguf.architectures import ARCHITECTURES as RULES
from app.domain.gguf.rules import gguf_refusals, language_model, unknown
from app.domain.inputs.architectures import find_architecture
from bitwright.errors import FormatCannotHold
from workers.formats.gguf.architectures.family import Config, Family
from workers.formats.gguf.architectures.names import Names, plain_name
from workers.formats.gguf.architectures.numbers import common_keys, config_of, experts_of, put
from workers.formats.gguf.architectures.registry import FAMILIES
from workers.formats.gguf.architectures.rows import rope_of, turned
from workers.formats.library_config import known_part
from workers.formats.source_files import SourceCheckpoint

KINDS: dict[str, MODEL_ARCH] = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
UNCAPPED = frozenset({"gemma3"})
"""Wrappers that do not cap their logits in transformers, whatever the language model's configuration says."""
HEADS = ("lm_head.weight", "embed_out.weight")
OTHER_FORMAT = "leave gguf out of formats: merged holds every model"


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's architecture in llama.cpp.

    model_type  of the language model, which a wrapper with a vision tower has inside
    config      transformers' own, of the whole model
    numbers     fields of the language model's configuration
    tied        whether the head is the embedding matrix
    """

    name: str
    model_type: str
    kind: MODEL_ARCH
    family: Family
    config: PreTrainedConfig
    numbers: Config
    tied: bool

    @classmethod
    def of(cls, source: SourceCheckpoint) -> "Architecture":
        """The architecture of a checkpoint.

        Raises:
            FormatCannotHold: llama.cpp does not know the model's type, or its configuration has something that a file
            cannot describe.
        """
        outer = find_architecture(source.config).model_type
        model_type = language_model(outer, source.config)
        if model_type not in RULES:
            raise FormatCannotHold(unknown(outer, model_type), field="formats", hint=OTHER_FORMAT)
        # Not from the folder's file: the source may be seen otherwise than that says, such as one block of it.
        config = CONFIG_MAPPING[outer].from_dict(deepcopy(known_part(source.config)))
        tied = _is_tied(source, config)
        config.tie_word_embeddings = tied
        for refusal in gguf_refusals(outer, config.to_dict()):
            raise FormatCannotHold(refusal, field="formats", hint=OTHER_FORMAT)
        rules = RULES[model_type]
        numbers = config_of(config, partial=rules.partial)
        if outer in UNCAPPED:
            numbers["final_logit_softcapping"] = None
        family = FAMILIES[model_type]
        name = family.other(numbers) or rules.name
        return cls(name, model_type, KINDS[name], family, config, numbers, tied)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.numbers["vocab_size"])

    @property
    def names(self) -> Names:
        """llama.cpp's names of the checkpoint's tensors."""
        return Names(self.kind, self.family, self.numbers, experts_of(self.numbers))

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters as transformers names them."""
        return rope_of(self.numbers)

    def add_to(self, writer: GGUFWriter, source: SourceCheckpoint) -> None:
        """Adds the architecture's numbers; of a key that stands twice the later one counts."""
        keys = dict(common_keys(self.family, self.numbers))
        if self.family.from_weights is not None:
            own = {plain_name(name): name for name in source.tensors}
            keys |= self.family.from_weights(self.numbers, lambda name: source.read(own[name]))
        for key, value in keys.items():
            put(writer, self.name, key, value)

    def added(self) -> dict[str, Tensor]:
        """Tensors that the source does not hold, by llama.cpp's names."""
        tensors = dict(self.family.added(self.numbers)) if self.family.added is not None else {}
        factors = self.rotary_factors()
        return tensors if factors is None else {**tensors, "rope_freqs.weight": factors}

    def rotary_factors(self) -> Tensor | None:
        """Divisor of each rotary frequency, fp32 (head_dim / 2,), under Llama 3's scaling; None without it.

        Waves longer than the original context by `low_freq_factor` are stretched by `factor`, those shorter by
        `high_freq_factor` stay, and between the two the frequency is interpolated.
        """
        rope = self.rope
        if rope["rope_type"] != "llama3":
            return None
        width, context = turned(self.numbers), rope["original_max_position_embeddings"]
        frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = context * frequency / (2 * math.pi)
        low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
        kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 / ((1 - kept) / factor + kept)).float()


def _is_tied(source: SourceCheckpoint, config: PreTrainedConfig) -> bool:
    """True if the head is the embedding matrix: the configuration says so, or the checkpoint has no head of its own."""
    text: Any = config.get_text_config(decoder=True)
    said = source.config.get("tie_word_embeddings", text.to_dict().get("tie_word_embeddings", False))
    return bool(said) or not any(name.endswith(HEADS) for name in source.tensors)
