"""Mixes of llama.cpp's types in requests: each linear's type by its name in transformers, and what wins over it."""

import re
from typing import Any

import pytest
from gguf.constants import MODEL_TENSOR
from gguf.tensor_mapping import TensorNameMap
from pydantic import ValidationError

from app.domain.methods import GPTQSpec, RTNSpec
from app.domain.methods.block_presets import MixFacts, block_types_of
from app.domain.methods.mixed_modules import part_of_file
from app.domain.methods.named_schemes import BlockPreset

NAMES = {
    MODEL_TENSOR.ATTN_V: "attn_v",
    MODEL_TENSOR.ATTN_QKV: "attn_qkv",
    MODEL_TENSOR.ATTN_KV_B: "attn_kv_b",
    MODEL_TENSOR.ATTN_K: "attn_k",
    MODEL_TENSOR.ATTN_OUT: "attn_output",
    MODEL_TENSOR.FFN_DOWN: "ffn_down",
    MODEL_TENSOR.FFN_DOWN_EXP: "ffn_down",
    MODEL_TENSOR.FFN_DOWN_SHEXP: "ffn_down",
}
OF_TRANSFORMERS = re.compile(r"^(model\.layers|transformer\.h|gpt_neox\.layers)\.\{bid\}\.")
ABSENT = re.compile(
    r"no_perm|language_(expert|mlp)|residual_mlp|moe\.down|experts\.down$|mixer|linear_attn$|\.down$|wo$|wv$|attn\.[kv]$"
    r"|mlp\.w2$|attention\.(w2|[kvo]_proj)$|chunk_experts|vision_mlp"
)
"""Names of models that transformers has no class of, or that this program does not accept."""


def rows(wanted: bool) -> list[tuple[str, str]]:
    found = []
    for tensor, names in TensorNameMap.block_mappings_cfg.items():
        part = NAMES.get(tensor)
        if (part is not None) == wanted:
            found += [(n.format(bid=3, xid=7), str(part)) for n in names if OF_TRANSFORMERS.match(n)]
    return [(name, part) for name, part in dict.fromkeys(found) if not ABSENT.search(name)]


@pytest.mark.parametrize(("name", "part"), rows(wanted=True))
def test_parts_that_mixes_tell_apart_are_those_of_ggufs_own_table(name: str, part: str) -> None:
    assert part_of_file(name) == f"blk.3.{part}.weight"


def test_experts_are_told_like_linears_of_an_mlp_of_their_own() -> None:
    assert part_of_file("model.layers.5.mlp.experts.12.down_proj") == "blk.5.ffn_down.weight"
    assert part_of_file("model.layers.5.block_sparse_moe.experts.12.w2") == "blk.5.ffn_down.weight"
    assert part_of_file("model.language_model.layers.5.self_attn.v_proj") == "blk.5.attn_v.weight"
    assert part_of_file("model.language_model.lm_head") == part_of_file("lm_head") == "output.weight"


def test_no_other_name_of_the_table_is_taken_for_one_of_them() -> None:
    told = {f"blk.3.{part}.weight" for part in NAMES.values()}
    both = {name for name, _ in rows(wanted=True)}
    wrong = [name for name, _ in rows(wanted=False) if name not in both and part_of_file(name) in told]
    assert wrong == []


LINEARS = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}


def spec(**fields: Any) -> RTNSpec:
    outer = {"embeddings": {"scheme": fields["scheme"]}, "head": {"scheme": fields["scheme"]}}
    return RTNSpec.model_validate({"modules": outer, **fields})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", BlockPreset)
def test_every_linear_gets_the_type_of_its_tensor(preset: BlockPreset, tied: bool) -> None:
    facts = MixFacts(17, 4, 0, tied)
    columns = {f"blk.{i}.{part}.weight": 512 for i in range(17) for part in LINEARS.values()}
    columns |= {"token_embd.weight": 512} | ({} if tied else {"output.weight": 512})
    table = block_types_of(preset, facts, columns)
    found = spec(scheme=preset.value).of_model(facts)
    for layer in range(17):
        for name, part in LINEARS.items():
            scheme = found.scheme_of(f"model.layers.{layer}.{name}")
            assert scheme is not None
            assert scheme.name == table[f"blk.{layer}.{part}.weight"], (layer, name)
    embeddings, head = found.embeddings_scheme(), found.head_scheme()
    assert embeddings is not None
    assert head is not None
    assert embeddings.name == table["token_embd.weight"]
    assert head.name == (embeddings.name if tied else table["output.weight"])


def test_what_the_request_says_besides_wins() -> None:
    rules = {"overrides": {"*.v_proj": {"scheme": "q8_0"}}, "embeddings": {"scheme": "q5_0"}, "ignore": []}
    given = RTNSpec.model_validate({"scheme": "q4_k_m", "modules": rules}).of_model(MixFacts(16, 2, 0, tied=True))
    scheme, other = given.scheme_of("model.layers.0.self_attn.v_proj"), given.scheme_of("model.layers.0.mlp.down_proj")
    assert (scheme and scheme.name, other and other.name) == ("q8_0", "q6_k")
    both = spec(scheme="q4_k_m", modules={"embeddings": {"scheme": "q5_0"}, "head": {"scheme": "q4_k_m"}})
    tied = both.of_model(MixFacts(16, 2, 0, tied=True))
    assert tied.head_scheme() == tied.embeddings_scheme()
    apart = both.of_model(MixFacts(16, 2, 0, tied=False)).head_scheme()
    assert apart is not None
    assert apart.name == "q6_k"


def test_names_are_taken_in_upper_case_and_the_type_is_no_mix() -> None:
    assert RTNSpec.model_validate({"scheme": "Q4_K_M"}).mix() is BlockPreset.Q4_K_M
    assert RTNSpec.model_validate({"scheme": "Q2_K"}).mix() is None
    assert RTNSpec.model_validate({"scheme": "q2_k_m"}).mix() is BlockPreset.Q2_K


def test_a_mix_is_of_a_whole_model_and_of_methods_that_know_the_types() -> None:
    with pytest.raises(ValidationError, match="a mix of a whole model"):
        RTNSpec.model_validate({"modules": {"overrides": {"*.v_proj": {"scheme": "q4_k_m"}}}})
    if not GPTQSpec.named_schemes >= RTNSpec.named_schemes:
        with pytest.raises(ValidationError, match="takes these schemes"):
            GPTQSpec.model_validate({"scheme": "q4_k_m"})
    with pytest.raises(ValidationError, match="not both"):
        RTNSpec.model_validate({"scheme": "q4_k_m", "bits": 4})
