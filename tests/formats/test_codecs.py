"""Storage of a linear in the two formats, and detection of damage."""

import pytest
import torch

from bitwright.errors import CorruptCheckpoint
from tests.formats.examples import Made, codebook_made, random_result, scheme
from workers.formats import compressed_tensors, native
from workers.formats.stored_linear import StoredLinear
from workers.numerics.normal_float import DoubleQuantization

SCHEME = scheme(3, 16, False)


def test_compressed_tensors_layout() -> None:
    tensors = compressed_tensors.compress("x", random_result((40, 48), SCHEME))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "x.weight_packed": (torch.int32, (40, 5)),  # 48 * 3 = 144 bits
        "x.weight_scale": (torch.bfloat16, (40, 3)),
        "x.weight_zero_point": (torch.int32, (4, 3)),  # 40 * 3 = 120 bits, along the outputs
        "x.weight_shape": (torch.int64, (2,)),
    }
    assert tensors["x.weight_shape"].tolist() == [40, 48]


def test_a_symmetric_linear_stores_no_zero_point() -> None:
    weight = random_result((8, 16), scheme(4, 16, True))
    assert compressed_tensors.compress("x", weight).keys() == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    assert native.compress("x", weight).keys() == {"x.codes", "x.scale", "x.shape"}


@pytest.mark.parametrize(
    "made",
    [
        *(Made(scheme(*of)) for of in ((2, 16, True), (5, -1, False), (7, 8, False))),
        Made(scheme(3, 8, False), offset=True, rank=3, factors=torch.float32),
        codebook_made(4, 16),
        codebook_made(3, 8, DoubleQuantization(3, torch.bfloat16, 16), rank=2),
    ],
    ids=str,
)
def test_native_stores_the_bits_that_the_report_counts(made: Made) -> None:
    result = random_result((24, 48), made)
    tensors = native.compress("x", result)
    stored = sum(t.numel() * t.element_size() * 8 for name, t in tensors.items() if name != "x.shape")
    assert result.stored_bits().total <= stored < result.stored_bits().total + 8


PLAIN = Made(SCHEME, rank=2)
DOUBLE = codebook_made(3, 16, DoubleQuantization(4, torch.float16, 5), rank=2)
SINGLE = codebook_made(3, 16)
OFFSET = Made(SCHEME, offset=True)
NATIVE_PARTS = [
    *((PLAIN, part) for part in ("codes", "scale", "shape", "zero_point", "lora_a", "lora_b")),
    *((DOUBLE, part) for part in ("codes", "codebook", "absmax_codes", "absmax_scale", "absmax_offset", "lora_b")),
    *((SINGLE, "absmax"), (OFFSET, "offset")),
]


@pytest.mark.parametrize(("made", "part"), NATIVE_PARTS, ids=str)
def test_native_tells_a_missing_or_misshapen_tensor(made: Made, part: str) -> None:
    result = random_result((40, 48), made)
    stored = StoredLinear.of(result)
    tensors = native.compress("x", result)
    shorter = tensors[f"x.{part}"][1:] if tensors[f"x.{part}"].ndim else torch.zeros(2)
    with pytest.raises(CorruptCheckpoint, match="do not fit its shape"):
        native.decompress("x", tensors | {f"x.{part}": shorter}, stored)
    del tensors[f"x.{part}"]
    with pytest.raises(CorruptCheckpoint, match=rf"x\.{part}"):
        native.decompress("x", tensors, stored)


@pytest.mark.parametrize("part", ["packed", "scale", "shape", "zero_point"])
def test_compressed_tensors_tells_a_missing_or_misshapen_tensor(part: str) -> None:
    result = random_result((40, 48), SCHEME)
    tensors, stored = compressed_tensors.compress("x", result), StoredLinear.of(result)
    shorter = {f"x.weight_{part}": tensors[f"x.weight_{part}"][1:]}
    if part != "shape":
        with pytest.raises(CorruptCheckpoint, match=r"do not fit its shape \(40, 48\)"):
            compressed_tensors.decompress("x", tensors | shorter, stored)
    del tensors[f"x.weight_{part}"]
    with pytest.raises(CorruptCheckpoint, match=rf"x\.weight_{part}"):
        compressed_tensors.decompress("x", tensors, stored)


def test_one_scheme_targets_the_class_and_several_the_names() -> None:
    one = compressed_tensors.config({"a": SCHEME, "b": SCHEME}, ["lm_head"])
    assert one["config_groups"] == {"group_0": _group(["Linear"])}
    assert one["ignore"] == ["lm_head"]
    other = scheme(8, -1, True)
    several = compressed_tensors.config({"a": SCHEME, "b": other, "c": SCHEME}, ["lm_head"])
    groups = several["config_groups"]
    assert isinstance(groups, dict)
    assert groups["group_0"] == _group(["a", "c"])
    assert groups["group_1"]["targets"] == ["b"]
    assert groups["group_1"]["weights"]["strategy"] == "channel"
    assert groups["group_1"]["weights"]["group_size"] is None


def test_config_asks_for_unpacking_only_where_packed_loading_fails() -> None:
    symmetric, asymmetric = scheme(4, 32, True), scheme(4, 32, False)
    # The name that old releases of transformers know, and the one that stays.
    keys = {"run_compressed": False, "dequantize": True}
    assert compressed_tensors.config({"a": asymmetric}, []).items() >= keys.items()
    assert keys.keys().isdisjoint(compressed_tensors.config({"a": symmetric}, []))
    assert keys.keys().isdisjoint(compressed_tensors.config({"a": symmetric, "b": asymmetric}, []))


def test_a_quantized_head_is_a_target_by_name() -> None:
    """vLLM's head is of another class than its linears."""
    groups = compressed_tensors.config({"a": SCHEME, "lm_head": SCHEME}, [])["config_groups"]
    assert groups == {"group_0": _group(["Linear", "lm_head"])}


def _group(targets: list[str]) -> dict[str, object]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": 3,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 16,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
