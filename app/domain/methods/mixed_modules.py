"""The type that llama.cpp's mixes give a module: its name in transformers says which tensor of a file it becomes.

Only the parts that the rules of a mix ask for are told apart (values, keys, the outputs of attention and of the MLP);
every other linear is of the mix's base type, whatever a file calls it. The names are those of gguf's own table
(`gguf.tensor_mapping` of the package gguf 0.19), which a test holds this against.
"""

import re

from app.domain.methods.block_presets import MixFacts, type_of_tensor
from app.domain.methods.named_schemes import BlockPreset, SchemeName
from app.domain.methods.schemes import HEAD_PATTERN, fits

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
ATTENTION = frozenset({"self_attn", "attn", "attention", "self_attention"})
"""Parts of a block, of which some plain names of linears say what they are."""
VALUE, VALUE_IN_ATTENTION = "v_proj", "wv"
JOINED = frozenset({"qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj_qkv"})
KEY, KEY_IN_ATTENTION = "k_proj", "wk"
OUTPUT = "o_proj"
OUTPUT_IN_ATTENTION = frozenset({"out_proj", "dense", "c_proj", "wo", "Wo"})
DOWN = frozenset({"down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "output_linear"})
DOWN_IN_MLP = frozenset({"c_proj", "Wo"})
EMBEDDINGS = "token_embd.weight"
"""The tensor of a file that embeddings are."""


def part_of_file(module: str) -> str:
    """The tensor that a linear becomes, as far as mixes tell tensors apart: `blk.3.attn_v.weight`."""
    if fits(module, HEAD_PATTERN):
        return "output.weight"
    layer, names = LAYER.search(module + "."), module.split(".")
    leaf, parent = names[-1], names[-2] if len(names) > 1 else ""
    return f"blk.{layer[1] if layer else 0}.{_part(leaf, parent)}.weight"


def _part(leaf: str, parent: str) -> str:
    """The part of a block in a file, as far as mixes tell; another linear's own last name."""
    attention = parent in ATTENTION
    if leaf == VALUE or (attention and leaf == VALUE_IN_ATTENTION):
        return "attn_v"
    if leaf in JOINED:
        return "attn_qkv"
    if leaf == "kv_b_proj":
        return "attn_kv_b"
    if leaf == KEY or (attention and leaf == KEY_IN_ATTENTION):
        return "attn_k"
    if leaf == OUTPUT or (attention and leaf in OUTPUT_IN_ATTENTION):
        return "attn_output"
    if leaf in DOWN or (leaf in DOWN_IN_MLP and parent == "mlp"):
        return "ffn_down"
    return leaf


def mixed_scheme(preset: BlockPreset, facts: MixFacts, module: str) -> SchemeName:
    """The type that a mix gives a linear or the head; not yet the one that its rows fall back to."""
    return type_of_tensor(preset, facts, part_of_file(module), None)


def mixed_embeddings(preset: BlockPreset, facts: MixFacts) -> SchemeName:
    """The type that a mix gives the matrix of embeddings."""
    return type_of_tensor(preset, facts, EMBEDDINGS, None)
