"""Storage of a linear in the two formats, and detection of damage."""

from dataclasses import replace

import pytest
import torch

from app.domain.methods import Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from tests.formats.examples import Made, codebook_made, random_result, scheme
from workers.formats import compressed_tensors, native
from workers.formats.stored_linear import StoredLinear
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import LinearResult

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
    assert keys.keys().isdisjoint(compressed_tensors.config({"a": asymmetric, "b": scheme(8, 32, False)}, []))


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


def named(name: str) -> Scheme:
    return Scheme.named(SchemeName(name))


S4, S8, Z4, Z8 = scheme(4, 32, True), scheme(8, -1, True), scheme(4, 32, False), scheme(8, 32, False)


@pytest.mark.parametrize(
    ("schemes", "unpacks", "loader"),
    [
        ([S4], False, False),
        ([S4, S4], False, False),
        ([S4, S8], False, False),
        ([Z4], True, False),
        ([Z4, Z4], True, False),
        ([Z4, Z8], False, True),
        ([S4, Z4], False, True),
        ([S4, S8, Z8], False, True),
        *(([named(name)], False, False) for name in ("fp8", "fp8-tensor", "fp8a16", "int8", "nvfp4", "mxfp8")),
        *(([named(name)], True, False) for name in ("fp8-block", "nvfp4a16", "mxfp4a16", "mxfp8a16")),
        ([S4, named("fp8")], False, False),
        ([named("nvfp4a16"), named("fp8")], False, False),
        ([named("fp8-block"), named("fp8")], False, True),
        ([Z4, named("fp8")], False, True),
    ],
)
def test_who_unpacks_a_checkpoint(schemes: list[Scheme], unpacks: bool, loader: bool) -> None:
    """Unpacked while loading, every linear gets the first group's scheme: so never where there are several."""
    assert compressed_tensors.unpacks_on_load(schemes) is unpacks
    by_name = {f"m.{index}": each for index, each in enumerate(schemes)}
    assert compressed_tensors.needs_loader(by_name) is loader
    config = compressed_tensors.config(by_name, [])
    assert ("run_compressed" in config, "dequantize" in config) == (unpacks, unpacks)


@pytest.mark.parametrize(
    ("experts", "others", "loader"),
    [
        (["fp8"], ["fp8"], False),
        (["fp8-tensor"], ["fp8"], False),
        (["mxfp4a16"], ["fp8"], False),
        (["fp8a16"], ["nvfp4a16"], False),
        (["nvfp4a16"], ["nvfp4a16"], True),
        (["int8"], ["int8"], True),
        (["mxfp8"], ["mxfp8"], True),
        (["fp8-block"], ["fp8-block"], True),
        (["fp8", "fp8a16"], ["fp8"], True),
    ],
)
def test_experts_that_transformers_misreads_come_with_a_loader(
    experts: list[str], others: list[str], loader: bool
) -> None:
    """It reads all of them by the first group, and leaves NVFP4's global scale out without a word."""
    schemes = {f"layers.0.self_attn.{index}": named(name) for index, name in enumerate(others)}
    schemes |= {f"layers.0.mlp.shared_experts.{index}": named("nvfp4a16") for index in ([] if loader else [0])}
    schemes |= {f"layers.0.mlp.experts.{index}.up_proj": named(name) for index, name in enumerate(experts)}
    assert compressed_tensors.needs_loader(schemes) is loader
    groups = compressed_tensors.config(schemes, [])["config_groups"]
    assert isinstance(groups, dict)
    if len(groups) > 1:
        assert "layers.0.mlp.experts.0.up_proj" in groups["group_0"]["targets"]


def test_the_configuration_of_one_scheme_in_full() -> None:
    assert compressed_tensors.config({"a": Z4}, ["lm_head", "b"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["b", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "run_compressed": False,
        "dequantize": True,
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_compressed_tensors_refuses_a_scale_that_it_would_round(stored: torch.dtype) -> None:
    weight = random_result((8, 32), Z4, torch.bfloat16).affine
    with pytest.raises(FormatCannotHold, match="rounding them") as caught:
        compressed_tensors.compress("x", LinearResult(replace(weight, scale=weight.scale.to(stored))))
    assert (caught.value.field, caught.value.value) == ("x", str(stored))


@pytest.mark.parametrize(("bits", "package"), [(2, ""), (3, ">=0.1"), (4, ""), (5, ">=0.1"), (8, "")])
def test_widths_that_straddle_words_need_a_newer_package(bits: int, package: str) -> None:
    needed = compressed_tensors.package_needed([S4, scheme(bits, 32, True)])
    assert needed.startswith(f"compressed-tensors{package}")
    assert (needed == "compressed-tensors") is (not package)
    assert (compressed_tensors.package_warnings([S4, scheme(bits, 32, True)]) == {}) is (not package)


def test_the_description_of_native_linears_in_full() -> None:
    results = {
        "a": random_result((8, 32), Made(scheme(3, 16, False), offset=True, rank=2, alpha=4.0)),
        "b": random_result((8, 32), codebook_made(4, 32, DoubleQuantization(3, torch.float16, 5)), torch.float16),
        "c": random_result((8, 32), S8),
    }
    assert native.describe({name: StoredLinear.of(result) for name, result in results.items()}) == {
        "format": "bitwright",
        "version": 2,
        "linears": {
            "a": {
                "form": "affine",
                "bits": 3,
                "group_size": 16,
                "symmetric": False,
                "dtype": "bfloat16",
                "offset": True,
                "low_rank": {"rank": 2, "alpha": 4.0},
            },
            "b": {
                "form": "codebook",
                "bits": 4,
                "group_size": 32,
                "symmetric": True,
                "dtype": "float16",
                "absmax": {"bits": 3, "superblock": 5},
            },
            "c": {"form": "affine", "bits": 8, "group_size": -1, "symmetric": True, "dtype": "bfloat16"},
        },
    }
