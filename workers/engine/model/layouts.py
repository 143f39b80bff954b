"""Layouts of decoders in transformers' own classes: a table, one row per architecture.

Which architectures there are, and the shapes that a config.json promises, is `app.domain.inputs.architectures`; this
table adds the module paths that only torch needs. A new row needs no code, but a proof:
`tests/engine/model/test_streamed_model.py` builds
a tiny random model of every row and holds that block by block gives the logits of the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.domain.inputs.architectures import find_architecture
from workers.contracts.blocks import Fold


def folds(*, before_mlp: str = "post_attention_layernorm", offset: float = 0.0) -> tuple[Fold, ...]:
    """Where scales can move in a block of the Llama shape.

    before_mlp  the norm whose output goes into the gated MLP
    offset      what norms add to their weights: 1 where they multiply by 1 + w

    That attention mixes values by sums over tokens and that `up` meets `gate` in a product cannot be seen from calls
    or shapes; `tests/engine/quantize/test_folds.py` holds every row against its model in fp64.
    """
    query_key, value = ("self_attn.q_proj", "self_attn.k_proj"), "self_attn.v_proj"
    return (
        Fold("input_layernorm", (*query_key, value), "self_attn", unclipped=query_key, offset=offset),
        Fold(value, ("self_attn.o_proj",), "self_attn.o_proj"),
        Fold(before_mlp, ("mlp.gate_proj", "mlp.up_proj"), "mlp", offset=offset),
        Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    )


@dataclass(frozen=True)
class Layout:
    """Module paths of a causal language model.

    decoder     the module whose forward makes masks and rotary embeddings and runs the blocks
    blocks      its list of decoder blocks
    folds       where scales can move inside a block
    """

    decoder: str = "model"
    embeddings: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    folds: tuple[Fold, ...] = folds()

    def block(self, index: int) -> str:
        """Full module name of a block."""
        return f"{self.blocks}.{index}"


LAYOUTS: MappingProxyType[str, Layout] = MappingProxyType(
    {
        "llama": Layout(),
        "mistral": Layout(),
        "qwen2": Layout(),
        "qwen3": Layout(),
        "gemma3_text": Layout(folds=folds(before_mlp="pre_feedforward_layernorm", offset=1.0)),
    }
)
"""By `model_type` of config.json."""


def layout_of(config: Mapping[str, object]) -> Layout:
    """The row for a decoded config.json.

    Raises:
        UnsupportedArchitecture: there is none, or the weights are quantized already.
    """
    return LAYOUTS[find_architecture(config).model_type]
