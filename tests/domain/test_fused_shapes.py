"""vLLM's rules on shapes, as its source has them: the same answers for the same shapes."""

import pytest

from app.domain.formats import FORMATS, ExportFormat
from app.domain.fused_shapes import shape_refusals, shape_warning
from app.domain.methods import Scheme, SchemeName

ROWS = FORMATS[ExportFormat.COMPRESSED_TENSORS].runtimes
(GPU,) = (row for row in ROWS if row.runtime == "vllm" and "NVIDIA" in row.devices)
(TRANSFORMERS,) = (row for row in ROWS if row.runtime == "transformers")
BLOCK = Scheme.named(SchemeName.FP8_BLOCK)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def block_of(q: int, kv: int, gate: int, hidden: int) -> dict[str, int]:
    rows = dict(zip(ATTENTION, (q, kv, kv, hidden), strict=True))
    return {
        **{f"model.layers.0.self_attn.{name}": count for name, count in rows.items()},
        **{f"model.layers.0.mlp.{name}": count for name, count in (("gate_proj", gate), ("up_proj", gate))},
        "model.layers.0.mlp.down_proj": hidden,
    }


def validated_by_vllm(outputs: dict[str, int]) -> bool:
    """validate_fp8_block_shape of vLLM 0.33 for its merged layers, without tensor parallelism: all but the last."""
    merged = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
    return all(outputs[f"model.layers.0.{parent}.{name}"] % 128 == 0 for parent, names in merged for name in names[:-1])


@pytest.mark.parametrize("q", [128, 576, 640])
@pytest.mark.parametrize("kv", [64, 128, 192])
@pytest.mark.parametrize("gate", [96, 1536])
@pytest.mark.parametrize("hidden", [576, 640])
def test_blocks_of_fused_linears(q: int, kv: int, gate: int, hidden: int) -> None:
    outputs = block_of(q, kv, gate, hidden)
    refused = shape_refusals(dict.fromkeys(outputs, BLOCK), outputs, GPU)
    assert (not refused) is validated_by_vllm(outputs)
    per_row = dict.fromkeys(outputs, Scheme.named(SchemeName.FP8))
    assert shape_refusals(per_row, outputs, GPU) == {}


def test_smollm2s_shapes_are_told_by_name() -> None:
    outputs = block_of(576, 192, 1536, 576)
    schemes = dict.fromkeys(outputs, BLOCK)
    (told,) = shape_warning("compressed-tensors", schemes, outputs, ROWS)
    first = (
        "it runs q_proj, k_proj, v_proj of model.layers.0.self_attn as one, in blocks of 128 rows, and q_proj has 576"
    )
    assert first in told
    assert "(and 1 more)" in told
    assert "by the rules of 0.33.0" in told
    assert shape_refusals(schemes, outputs, TRANSFORMERS) == {}


def test_the_last_of_a_fused_set_and_linears_that_run_alone_may_have_any_shape() -> None:
    outputs = block_of(128, 128, 128, 100) | {"model.layers.0.self_attn.v_proj": 72, "model.layers.0.mlp.up_proj": 33}
    assert shape_refusals(dict.fromkeys(outputs, BLOCK), outputs, GPU) == {}


@pytest.mark.parametrize(
    ("name", "refused"), [("gate_proj", True), ("up_proj", True), ("w3", True), ("down_proj", False)]
)
def test_experts_want_whole_blocks_of_gate_and_up(name: str, refused: bool) -> None:
    linear = f"model.layers.0.mlp.experts.3.{name}"
    assert bool(shape_refusals({linear: BLOCK}, {linear: 200}, GPU)) is refused
    assert shape_refusals({linear: BLOCK}, {linear: 256}, GPU) == {}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [32, 40, 48, 64, 192, 100])
def test_zero_points_fill_words(bits: int, rows: int) -> None:
    def scheme(symmetric: bool) -> Scheme:
        return Scheme(bits=bits, group_size=64, symmetric=symmetric)

    refused = shape_refusals({"a.o_proj": scheme(False)}, {"a.o_proj": rows}, GPU)
    assert bool(refused) is (rows * bits % 32 != 0)
    assert all(f"{rows} outputs, {bits} bits each" in reason for reason in refused.values())
    assert shape_refusals({"a.o_proj": scheme(True)}, {"a.o_proj": rows}, GPU) == {}


def test_what_is_not_known_or_not_loaded_at_all_is_not_told() -> None:
    assert shape_refusals({"a.q_proj": BLOCK}, {}, GPU) == {}
    tiny = Scheme(bits=4, group_size=8, symmetric=False)
    assert not GPU.loads(tiny)
    assert shape_refusals({"a.q_proj": tiny}, {"a.q_proj": 33}, GPU) == {}


def test_experts_have_no_kernel_for_fp8_weights_alone() -> None:
    alone, served = Scheme.named(SchemeName.FP8A16), Scheme.named(SchemeName.FP8)
    for name, refused in (("mlp.experts.0.down_proj", True), ("mlp.down_proj", False)):
        assert bool(shape_refusals({name: alone}, {name: 256}, GPU)) is refused
        assert shape_refusals({name: served}, {name: 256}, GPU) == {}
