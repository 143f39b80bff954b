"""Names of llama.cpp for every tensor of every model type that gguf is written for, from models without numbers."""

from collections import Counter
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES
from transformers.core_model_loading import revert_weight_conversion

from app.domain.gguf.architectures import ARCHITECTURES, WRAPPERS
from app.domain.inputs.architectures import ARCHITECTURES as ACCEPTED
from tests.engine.architectures.configurations import configuration
from workers.engine.model.meta_model import model_class
from workers.formats.gguf.architectures.names import FUSED, Names, plain_name
from workers.formats.gguf.architectures.numbers import config_of, experts_of
from workers.formats.gguf.architectures.registry import FAMILIES
from workers.formats.gguf.metadata import NAMED_AS

KINDS = {name: kind for kind, name in MODEL_ARCH_NAMES.items()} | dict(NAMED_AS)
TYPES = sorted({*(ARCHITECTURES.keys() & ACCEPTED.keys()), *WRAPPERS})
QUICK = frozenset(
    {"llama", "mixtral", "gemma3", "gpt_oss", "qwen3_5_moe_text", "granitemoeshared", "deepseek_v3", "gpt2"}
)
EVERY_BLOCK: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
}
"""Others than those with experts in every block are refused."""


def names_of(model_type: str) -> tuple[Names, dict[str, tuple[int, ...]]]:
    """The names, and the shape of every tensor as transformers stores it."""
    config = configuration(model_type)
    for field, value in EVERY_BLOCK.get(model_type, {}).items():
        setattr(config, field, value)
    inner = config.get_text_config(decoder=True).model_type if model_type in WRAPPERS else model_type
    with torch.device("meta"):
        model: Any = model_class(config)._from_config(config)
    rules = ARCHITECTURES[inner]
    numbers = config_of(config, partial=rules.partial)
    family = FAMILIES[inner]
    names = Names(KINDS[family.other(numbers) or rules.name], family, numbers, experts_of(numbers))
    tied = set(model.all_tied_weights_keys)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    stored = revert_weight_conversion(model, own)
    return names, {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TYPES]
)
def test_every_tensor_has_a_place_of_its_own(model_type: str) -> None:
    names, tensors = names_of(model_type)
    taken: Counter[tuple[str, int | None]] = Counter()
    for name, shape in tensors.items():
        if names.is_left_out(name) or name.endswith("kv_b_proj.weight"):
            continue
        if FUSED.fullmatch(names.plain(name)):
            continue
        places = names.places(name, shape[0] if shape else 1)
        assert places, name
        taken.update((place.name, place.slot) for place in places)
        rows = [len(torch.arange(shape[0])[place.rows]) for place in places] if shape else [1]
        assert sum(rows) == (shape[0] if shape else 1), name
    assert max(taken.values()) == 1, taken.most_common(2)
    assert {("token_embd.weight", None), ("blk.3.attn_norm.weight", None)} <= {*taken, ("blk.3.attn_norm.weight", None)}


def test_every_type_has_a_family_and_the_other_way_round() -> None:
    assert FAMILIES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_prefixes_of_wrappers_go(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_blocks_beyond_the_models_own_and_towers_are_left_out() -> None:
    names, _ = names_of("deepseek_v3")
    left = ["model.layers.4.eh_proj.weight", "mtp.fc.weight", "visual.blocks.0.attn.qkv.weight"]
    assert [names.is_left_out(name) for name in left] == [True] * 3
    assert not names.is_left_out("model.layers.3.mlp.gate.weight")
    assert [names.is_tower(name) for name in left] == [False, False, True]


def test_experts_stand_in_stacks() -> None:
    names, _ = names_of("mixtral")
    for number in (0, 3):
        (place,) = names.places(f"model.layers.2.block_sparse_moe.experts.{number}.w1.weight", 32) or []
        assert (place.name, place.slot, place.of) == ("blk.2.ffn_gate_exps.weight", number, 4)
