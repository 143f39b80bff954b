"""llama.cpp's types as schemes: bits, what rows of other lengths get, and what a request may say of them."""

import pytest
from pydantic import ValidationError

from app.domain.methods import BLOCK_SCHEMES, Candidate, Form, GPTQSpec, RTNSpec, Scheme, SchemeName
from app.domain.methods.block_presets import BlockPreset, MixFacts, block_types_of
from app.domain.methods.module_rules import rule_errors

BITS = {
    **{"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq3_s": 3.4375, "iq4_nl": 4.5},
    **{"iq4_xs": 4.25, "q2_0": 2.25, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5},
}
INSTEAD = {
    **{"q2_k": "q4_0", "q3_k": "q4_0", "q2_0": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
    **{"iq3_s": "iq4_nl", "iq4_xs": "iq4_nl"},
}


@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_bits_and_the_type_of_rows_that_are_not_whole_blocks(name: SchemeName) -> None:
    scheme = Scheme.named(name)
    assert scheme.form is Form.BLOCKS
    assert scheme.bits_per_weight(512) == BITS[name]
    assert Candidate(scheme).stored_bits((3, 512), 16) == 3 * 512 * BITS[name]
    assert scheme.fitted(512) == scheme
    other = scheme.fitted(96)
    assert other.name == INSTEAD.get(name, name)
    assert scheme.bits_per_weight(96) == BITS[str(other.name)]
    assert [scheme.divides(columns) for columns in (96, 576, 48, 16)] == [True, True, False, False]
    assert Scheme.model_validate(scheme.model_dump()) == scheme


def test_text_weighs_the_columns_unless_weights_alone_are_asked_for() -> None:
    by_name = RTNSpec.model_validate({"scheme": "q4_k"})
    assert (by_name.reads_text(), by_name.needs_original_inputs(), by_name.needs_model()) == (True, False, False)
    override = {"modules": {"overrides": {"*.down_proj": {"scheme": "q2_k"}}}}
    assert RTNSpec.model_validate(override).reads_text()
    assert not RTNSpec.model_validate({"scheme": "q4_k", "weights_only": True}).reads_text()
    assert not RTNSpec.model_validate({"scheme": "nvfp4a16"}).reads_text()
    assert not RTNSpec().reads_text()


def test_methods_that_do_not_know_them_refuse_them() -> None:
    with pytest.raises(ValidationError):
        GPTQSpec.model_validate({"scheme": "q4_k"})


def test_rows_that_no_type_holds_are_told() -> None:
    (error,) = rule_errors(RTNSpec.model_validate({"scheme": "q4_k"}), {"a": 576, "b": 48}, head="lm_head", tied=False)[
        -1:
    ]
    assert (error.field, error.value) == ("quantization.scheme", "q4_k")
    assert "48 inputs of b" in error.detail


TENSORS = {
    **{f"blk.{layer}.{name}.weight": 256 for layer in range(16) for name in ("attn_q", "attn_k", "attn_v", "ffn_up")},
    **{f"blk.{layer}.attn_output.weight": 256 for layer in range(16)},
    **{f"blk.{layer}.ffn_down.weight": 512 for layer in range(16)},
    "token_embd.weight": 256,
    "output.weight": 256,
}


def chosen(preset: BlockPreset, part: str, facts: MixFacts = MixFacts(16, 2, 0, tied=False)) -> list[str]:
    found = block_types_of(preset, facts, TENSORS)
    return [found[f"blk.{layer}.{part}.weight"].value for layer in range(16)]


def test_a_mix_by_hand() -> None:
    """Q4_K_M of 16 layers: six bits in layers 0, 1, 14, 15 and in every third from 4 on."""
    wide = {0, 1, 4, 7, 10, 13, 14, 15}
    expected = ["q6_k" if layer in wide else "q4_k" for layer in range(16)]
    assert chosen(BlockPreset.Q4_K_M, "attn_v") == chosen(BlockPreset.Q4_K_M, "ffn_down") == expected
    assert set(chosen(BlockPreset.Q4_K_M, "attn_q")) == {"q4_k"}
    assert chosen(BlockPreset.Q3_K_M, "attn_v")[:3] == ["q5_k", "q5_k", "q4_k"]
    assert chosen(BlockPreset.Q3_K_M, "ffn_down")[:2] == ["q5_k", "q4_k"]
    assert set(chosen(BlockPreset.Q2_K, "attn_v")) == {"q3_k"}
    assert set(chosen(BlockPreset.Q2_K, "attn_v", MixFacts(16, 4, 0, tied=False))) == {"q4_k"}


def test_embeddings_head_and_rows_of_other_lengths_in_a_mix() -> None:
    facts = MixFacts(30, 3, 0, tied=True)
    found = block_types_of(BlockPreset.Q2_K, facts, {"token_embd.weight": 576, "blk.0.attn_q.weight": 576})
    assert found == {"token_embd.weight": "q8_0", "blk.0.attn_q.weight": "q4_0"}
    found = block_types_of(BlockPreset.Q4_K_M, MixFacts(16, 1, 8, tied=False), TENSORS)
    assert (found["output.weight"], found["token_embd.weight"]) == ("q6_k", "q4_k")
    assert (found["blk.9.attn_k.weight"], found["blk.9.attn_v.weight"]) == ("q8_0", "q8_0")
    assert found["blk.9.attn_output.weight"] == "q5_k"
    with pytest.raises(ValueError, match="48 columns"):
        block_types_of(BlockPreset.Q4_K_M, facts, {"blk.0.attn_q.weight": 48})
