"""The rule for what a job without a model quantizes: names of real families, shapes at the limits, and refusals."""

from dataclasses import dataclass
from typing import Any

import pytest

from app.domain.methods import RTNSpec
from app.domain.weight_targets import HEADS, LEAST_SIDE, Targets, left_alone, weight_targets
from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class Entry:
    shape: tuple[int, ...]
    dtype: str = "BF16"


LINEARS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.self_attn.output_gate",
    "model.layers.0.block_sparse_moe.experts.7.w1",
    "model.layers.0.mlp.experts.12.down_proj",
    "model.layers.0.mlp.shared_experts.up_proj",
    "model.layers.0.linear_attn.in_proj_qkvz",
    "model.layers.0.mamba.in_proj",
    "model.layers.0.conv.in_proj",
    "model.layers.0.self_attn.kv_a_proj_with_mqa",
    "backbone.layers.3.mixer.out_proj",
    "gpt_neox.layers.0.attention.query_key_value",
    "language_model.model.layers.0.feed_forward.w2",
]
LEFT = [
    "model.embed_tokens",
    "model.language_model.embed_tokens_per_layer",
    "transformer.wte",
    "transformer.wpe",
    "model.norm",
    "model.layers.0.self_attn.q_norm",
    "transformer.ln_f",
    "model.layers.0.mlp.gate",
    "model.layers.0.block_sparse_moe.gate",
    "model.layers.0.mlp.router",
    "model.layers.0.router.proj",
    "model.layers.0.mlp.gate.wg",
    "model.layers.0.mlp.shared_expert_gate",
    "model.layers.0.linear_attn.conv1d",
    "model.layers.0.mixer.A_log",
    "model.layers.0.mamba.dt_proj",
    "model.layers.0.mamba.x_proj",
    "mtp.layers.0.mlp.gate_proj",
    "model.mtp.layers.0.self_attn.q_proj",
    "model.layers.2.mlp.gate_proj",
    "model.visual.blocks.0.attn.qkv",
    "vision_tower.encoder.layers.0.mlp.fc1",
    "model.audio_tower.layers.0.fc1",
    "multi_modal_projector.linear_1",
    "model.layers.0.self_attn.indexer.weights_proj",
    "model.layers.0.per_layer_input_gate",
    "model.layers.0.altup.prediction_coefs",
    "model.layers.0.laurel.linear_left",
    "score",
    "lm_head",
    "language_model.lm_head",
    "embed_out",
    "output",
]


def found(tensors: dict[str, Entry], config: dict[str, Any] | None = None, **spec: Any) -> Targets:
    return weight_targets(tensors, {"num_hidden_layers": 2, **(config or {})}, RTNSpec(**{"group_size": 32, **spec}))


def test_linears_of_real_families_are_taken_and_what_is_none_is_not() -> None:
    names = [name.replace("layers.3", "layers.1") for name in LINEARS]
    targets = found({f"{name}.weight": Entry((64, 64)) for name in [*names, *LEFT]})
    assert [target.name for target in targets.linears] == sorted(names)
    assert set(targets.left_alone) == set(LEFT)
    assert targets.left_alone["model.layers.2.mlp.gate_proj"] == "blocks that predict further tokens"
    assert (LEAST_SIDE, sorted(HEADS)) == (32, ["embed_out", "lm_head", "output"])


def test_a_layer_after_the_last_is_of_multi_token_prediction_only_where_the_number_is_known() -> None:
    assert left_alone("model.layers.46.mlp.up_proj", 46) == "blocks that predict further tokens"
    assert left_alone("model.layers.46.mlp.up_proj", 92) is None
    assert left_alone("model.layers.46.mlp.up_proj", None) is None


@pytest.mark.parametrize(
    ("entry", "taken"),
    [
        (Entry((32, 32)), True),
        (Entry((31, 32)), False),
        (Entry((32, 31)), False),
        (Entry((32, 48)), False),
        (Entry((64, 64), "F32"), True),
        (Entry((64, 64), "F16"), True),
        (Entry((64, 64), "F64"), True),
        (Entry((64, 64), "I32"), False),
        (Entry((64, 64), "F8_E4M3"), False),
        (Entry((64,)), False),
        (Entry((64, 64, 1)), False),
    ],
)
def test_shapes_and_dtypes(entry: Entry, taken: bool) -> None:
    targets = found({"a.weight": entry, "b.weight": Entry((64, 64)), "c": Entry((64, 64))})
    assert [target.name for target in targets.linears] == (["a"] if taken else []) + ["b"]


def test_the_head_is_taken_where_it_is_asked_for() -> None:
    tensors = {name: Entry((64, 64)) for name in ("lm_head.weight", "a.weight")}
    assert [target.name for target in found(tensors, modules={"ignore": ()}).linears] == ["a", "lm_head"]
    with pytest.raises(BitwrightError, match="shares its matrix"):
        found({"a.weight": Entry((64, 64))}, modules={"ignore": ()})


def experts(shape: tuple[int, int, int], name: str = "gate_up_proj", **config: Any) -> list[Any]:
    targets = found(
        {f"layers.0.mlp.experts.{name}": Entry(shape), "a.weight": Entry((64, 64))}, {"hidden_size": 64, **config}
    )
    return [(t.name.rpartition("experts.")[2], t.shape, t.place) for t in targets.linears if t.place is not None]


def test_fused_experts_are_linears_one_by_one() -> None:
    plain = experts((2, 192, 64))
    assert [(name, shape) for name, shape, _ in plain] == [
        *(("0.gate_proj", (96, 64)), ("0.up_proj", (96, 64)), ("1.gate_proj", (96, 64)), ("1.up_proj", (96, 64))),
    ]
    assert [(p.expert, p.first, p.step, p.transposed) for *_, p in plain] == [
        *((0, 0, 1, False), (0, 96, 1, False), (1, 0, 1, False), (1, 96, 1, False)),
    ]
    turned = experts((1, 64, 192), model_type="llama4_text")
    assert [(shape, p.first, p.step, p.transposed) for _, shape, p in turned] == [
        *(((96, 64), 0, 1, True), ((96, 64), 96, 1, True)),
    ]
    in_turn = experts((1, 64, 192), model_type="gpt_oss")
    assert [(shape, p.first, p.step, p.transposed) for _, shape, p in in_turn] == [
        *(((96, 64), 0, 2, True), ((96, 64), 1, 2, True)),
    ]
    assert [(n, s, p.transposed) for n, s, p in experts((1, 64, 96), "down_proj")] == [("0.down_proj", (64, 96), False)]
    assert [(n, s, p.transposed) for n, s, p in experts((1, 96, 64), "down_proj")] == [("0.down_proj", (64, 96), True)]
    assert [(n, s) for n, s, _ in experts((1, 96, 64), "up_proj")] == [("0.up_proj", (96, 64))]


def test_experts_whose_shape_does_not_show_how_they_lie_stay() -> None:
    assert experts((2, 64, 64), "down_proj") == []
    assert experts((2, 100, 200)) == [], "neither side is the model's width"
    assert experts((2, 193, 64)) == [], "an odd number of rows has no halves"
    assert experts((2, 192, 64), "gate_up_proj_bias") == []


def test_matrices_that_are_stored_input_by_output_are_left_to_the_models_class() -> None:
    with pytest.raises(BitwrightError) as refused:
        found({"h.0.attn.c_attn.weight": Entry((64, 192))}, {"model_type": "gpt2"})
    assert refused.value.code == "unsupported_architecture"


def test_patterns_and_groups_that_fit_nothing_are_refused() -> None:
    tensors = {"a.weight": Entry((64, 64)), "b.weight": Entry((64, 96)), "gate.weight": Entry((64, 64))}

    def code(**spec: Any) -> str:
        with pytest.raises(BitwrightError) as refused:
            found(tensors, **spec)
        return refused.value.code

    assert code(group_size=40) == "group_size_does_not_divide"
    assert [target.name for target in found(tensors, group_size=64).linears] == ["a"]
    assert code(modules={"overrides": {"b": {"group_size": 64}}}) == "group_size_does_not_divide"
    assert code(modules={"overrides": {"gate": {"bits": 8}}}) == "unknown_module", "a router is no linear"
    assert code(modules={"ignore": ("none",)}) == "unknown_module"
    assert [t.name for t in found(tensors, modules={"ignore": ("gate", "a", "lm_head")}).linears] == ["b"]
    assert code(modules={"ignore": ("*",)}) == "invalid_request"
    assert found({"a.weight": Entry((64, 70))}, group_size=-1).weights == 64 * 70
