"""Where the parts of a decoder lie in transformers' own classes: a table, one row an architecture.

Which architectures there are, and the shapes that a config.json promises, is `app.domain.architectures`; this table
adds the module paths that only torch needs. A new row needs no code, but a proof: `tests/engine/test_blocks.py` builds
a tiny random model of every row and holds that block by block gives the logits of the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.domain.architectures import find_architecture


@dataclass(frozen=True)
class Layout:
    """Module paths of a causal language model.

    decoder     the module whose forward makes masks and rotary embeddings and runs the blocks
    blocks      its list of decoder blocks
    """

    decoder: str = "model"
    embeddings: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def block(self, index: int) -> str:
        """Full module name of a block."""
        return f"{self.blocks}.{index}"


LAYOUTS: MappingProxyType[str, Layout] = MappingProxyType(
    {
        "llama": Layout(),
        "mistral": Layout(),
        "qwen2": Layout(),
        "qwen3": Layout(),
        "gemma3_text": Layout(),
    }
)
"""By `model_type` of config.json."""


def layout_of(config: Mapping[str, object]) -> Layout:
    """The row for a decoded config.json.

    Raises:
        UnsupportedArchitecture: there is none, or the weights are quantized already.
    """
    return LAYOUTS[find_architecture(config).model_type]
