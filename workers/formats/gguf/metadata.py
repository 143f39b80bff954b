"""The architecture of a checkpoint as GGUF metadata: names, numbers, and the order of rows that llama.cpp expects.

Llama's rotary embedding pairs row i of a head with row i + d/2 in transformers and with row i + 1 in GGML, so that rows
of q and k (and their biases) are reordered: (heads, 2, d/2) becomes (heads, d/2, 2). Whole rows move, with their codes
and scales, so nothing is rounded. Qwen keeps transformers' order.

Numbers that config.json leaves out are those that transformers assumes. Models that a file cannot describe are refused
by the rules of `app.domain.gguf_rules`, applied here to the configuration as transformers completes it.
"""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from app.domain.gguf_rules import ARCHITECTURES as RULES
from app.domain.gguf_rules import gguf_refusals
from app.domain.inputs.architectures import Dimensions, read_dimensions
from bitwright.errors import FormatCannotHold
from workers.formats.source_files import SourceCheckpoint

KINDS = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
ARCHITECTURES: MappingProxyType[str, MODEL_ARCH] = MappingProxyType(
    {model_type: KINDS[rules.name] for model_type, rules in RULES.items()}
)
"""transformers' `model_type` -> GGUF's architecture."""


OTHER_FORMAT = "leave gguf out of formats: compressed-tensors and merged hold this model"


@dataclass(frozen=True)
class Architecture:
    """An architecture's metadata and its reordered rows.

    permuted    last names of linears whose rows are reordered -> their heads
    """

    kind: MODEL_ARCH
    config: PreTrainedConfig
    dimensions: Dimensions
    permuted: dict[str, int]

    @classmethod
    def of(cls, source: SourceCheckpoint) -> "Architecture":
        """The architecture of a checkpoint.

        Raises:
            FormatCannotHold: the model's type is not known here, or its configuration has something that a file cannot
            describe.
        """
        dimensions = read_dimensions(source.config)
        model_type = dimensions.architecture.model_type
        if model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            detail = f"gguf is written for {known}, not for {model_type}"
            raise FormatCannotHold(detail, field="formats", hint=OTHER_FORMAT)
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        config.tie_word_embeddings = dimensions.tied_embeddings  # the source may be seen otherwise than its file says
        kind = ARCHITECTURES[model_type]
        moved = {"q_proj": dimensions.heads, "k_proj": dimensions.key_value_heads} if kind is MODEL_ARCH.LLAMA else {}
        for refusal in gguf_refusals(model_type, config.to_dict()):
            raise FormatCannotHold(refusal, field="formats", hint=OTHER_FORMAT)
        return cls(kind, config, dimensions, moved)

    @property
    def name(self) -> str:
        name: str = MODEL_ARCH_NAMES[self.kind]
        return name

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters as transformers names them."""
        return {"rope_type": "default", **(self.config.rope_parameters or {})}

    def row_order(self, tensor: str) -> Tensor | None:
        """Source index of each row of a stored tensor (by its name in the source), int64 (rows,); None: unchanged."""
        heads = next((count for name, count in self.permuted.items() if f".{name}." in tensor), None)
        if heads is None:
            return None
        half = self.dimensions.head_dim // 2
        return torch.arange(heads * 2 * half).view(heads, 2, half).transpose(1, 2).flatten()

    def add_to(self, writer: GGUFWriter) -> None:
        """Adds the architecture's numbers."""
        numbers, config = self.dimensions, self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(numbers.hidden)
        writer.add_block_count(numbers.layers)
        writer.add_feed_forward_length(numbers.intermediate)
        writer.add_head_count(numbers.heads)
        writer.add_head_count_kv(numbers.key_value_heads)
        writer.add_key_length(numbers.head_dim)
        writer.add_value_length(numbers.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(numbers.vocabulary)
        writer.add_rope_dimension_count(numbers.head_dim)
        writer.add_rope_freq_base(float(self.rope["rope_theta"]))

    def rotary_factors(self) -> Tensor | None:
        """Divisor of each rotary frequency, fp32 (head_dim / 2,), under Llama 3's scaling; None without it.

        Waves longer than the original context by `low_freq_factor` are stretched by `factor`, those shorter by
        `high_freq_factor` stay, and between the two the frequency is interpolated.
        """
        rope = self.rope
        if rope["rope_type"] != "llama3":
            return None
        width, context = self.dimensions.head_dim, rope["original_max_position_embeddings"]
        frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = context * frequency / (2 * math.pi)
        low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
        kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 / ((1 - kept) / factor + kept)).float()
