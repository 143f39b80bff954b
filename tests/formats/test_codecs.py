"""What the two formats store for a linear, and how damage is told."""

from types import ModuleType

import pytest
import torch

from app.domain.errors import CorruptCheckpoint
from tests.formats.examples import random_weight, scheme
from workers.formats import compressed_tensors, native

SCHEME = scheme(3, 16, False)


def test_compressed_tensors_layout() -> None:
    tensors = compressed_tensors.compress("x", random_weight((40, 48), SCHEME))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "x.weight_packed": (torch.int32, (40, 5)),  # 48 * 3 = 144 bits
        "x.weight_scale": (torch.bfloat16, (40, 3)),
        "x.weight_zero_point": (torch.int32, (4, 3)),  # 40 * 3 = 120 bits, along the outputs
        "x.weight_shape": (torch.int64, (2,)),
    }
    assert tensors["x.weight_shape"].tolist() == [40, 48]


def test_a_symmetric_linear_stores_no_zero_point() -> None:
    weight = random_weight((8, 16), scheme(4, 16, True))
    assert compressed_tensors.compress("x", weight).keys() == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    assert native.compress("x", weight).keys() == {"x.codes", "x.scale", "x.shape"}


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(2, 16, True), (5, -1, False), (7, 8, False)])
def test_native_stores_the_bits_that_the_report_counts(bits: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight((24, 48), scheme(bits, group_size, symmetric))
    tensors = native.compress("x", weight)
    stored = sum(t.numel() * t.element_size() * 8 for name, t in tensors.items() if name != "x.shape")
    assert weight.stored_bits().total <= stored < weight.stored_bits().total + 8


@pytest.mark.parametrize(
    ("codec", "part"),
    [
        *(
            (compressed_tensors, part)
            for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        ),
        *((native, part) for part in ("codes", "scale", "shape", "zero_point")),
    ],
)
def test_a_missing_tensor_is_named(codec: ModuleType, part: str) -> None:
    tensors = codec.compress("x", random_weight((40, 48), SCHEME))
    del tensors[f"x.{part}"]
    with pytest.raises(CorruptCheckpoint, match=rf"x\.{part}"):
        codec.decompress("x", tensors, SCHEME, torch.bfloat16)


@pytest.mark.parametrize("codec", [compressed_tensors, native])
@pytest.mark.parametrize("part", ["packed", "scale", "zero_point"])
def test_tensors_that_do_not_fit_together_are_refused(codec: ModuleType, part: str) -> None:
    tensors = codec.compress("x", random_weight((40, 48), SCHEME))
    prefix, name = ("weight_", part) if codec is compressed_tensors else ("", part.replace("packed", "codes"))
    tensors[f"x.{prefix}{name}"] = tensors[f"x.{prefix}{name}"][1:]
    with pytest.raises(CorruptCheckpoint, match=r"do not fit its shape \(40, 48\)"):
        codec.decompress("x", tensors, SCHEME, torch.bfloat16)


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
    assert compressed_tensors.config({"a": asymmetric}, [])["run_compressed"] is False
    assert "run_compressed" not in compressed_tensors.config({"a": symmetric}, [])
    assert "run_compressed" not in compressed_tensors.config({"a": symmetric, "b": asymmetric}, [])


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
