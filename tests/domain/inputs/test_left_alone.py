"""Modules that are never quantized, by their names."""

import pytest

from app.domain.inputs.left_alone import is_further_part, left_alone

LEFT = """
mlp.gate block_sparse_moe.gate mlp.router feed_forward.router router.proj mlp.shared_expert_gate mixer.conv1d conv
linear_attn.conv1d mamba.dt_proj mamba.x_proj self_attn.indexer.weights_proj self_attn.indexer.wk per_layer_input_gate
per_layer_projection altup.correction_coefs laurel.linear_left visual.blocks.0.attn.qkv vision_tower.encoder.fc1
audio_tower.layers.0.fc1 multi_modal_projector.linear_1 mtp.layers.0.mlp.up_proj embed_tokens input_layernorm q_norm
"""
QUANTIZED = """
mlp.gate_proj mlp.gate_up_proj mlp.up_proj self_attn.q_proj self_attn.qkv_proj attention.query_key_value mlp.c_fc fc1
mlp.experts.0.gate_proj mlp.shared_expert.gate_proj linear_attn.in_proj_qkvz linear_attn.in_proj_ba mamba.in_proj
mixer.out_proj self_attn.kv_a_proj_with_mqa self_attn.output_gate mlp.dense_4h_to_h attn.Wqkv feed_forward.w1
"""


@pytest.mark.parametrize("name", LEFT.split())
def test_it_stays_as_it_is(name: str) -> None:
    assert left_alone(name)
    assert left_alone(f"model.layers.3.{name}.weight")


@pytest.mark.parametrize("name", QUANTIZED.split())
def test_it_is_a_linear_like_any_other(name: str) -> None:
    assert not left_alone(name)


def test_tensors_of_other_parts_are_told_from_strangers() -> None:
    for name in ("mtp.fc.weight", "model.mtp_layers.0.norm.weight", "model.vision_tower.x.bias", "visual.merger.mlp.0"):
        assert is_further_part(name, layers=4)
    assert is_further_part("model.layers.4.eh_proj.weight", layers=4, more=1)
    for name in ("model.layers.4.eh_proj.weight", "v_head.summary.weight", "score.weight", "lm_head_2.weight"):
        assert not is_further_part(name, layers=4)
    assert not is_further_part("model.layers.5.eh_proj.weight", layers=4, more=1)
    assert not is_further_part("model.layers.3.eh_proj.weight", layers=4, more=1)
