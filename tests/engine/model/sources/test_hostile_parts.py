"""Quantized weights from strangers: parts that do not fit each other are refused by name, or mean what they promise."""

import json
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from bitwright.errors import CorruptCheckpoint, InputError
from tests.api.checkpoints import CONFIG
from tests.engine.model.sources.encoders import KINDS
from tests.engine.model.sources.folders import drawn
from workers.engine.model.checkpoint import Checkpoint

OUT, WIDTH = 64, 96
MOST_NUMBERS_A_BYTE = 16
"""Of 2-bit codes four, doubled by what a partial word may hold, and as much again for small weights."""


def stored(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stored tensors of the weight `a.weight`, and quantization_config."""
    encode, given_settings = KINDS[kind]
    return {f"a.{part}": tensor.contiguous() for part, tensor in encode(drawn(OUT, WIDTH)).items()}, given_settings


def mxfp4() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of experts."""
    tensors = {"a_blocks": torch.zeros(2, 8, 3, 16, dtype=torch.uint8), "a_scales": torch.zeros(2, 8, 3).byte()}
    return tensors, {"quant_method": "mxfp4"}


def opened(folder: Path, tensors: dict[str, Tensor], given_settings: object) -> Checkpoint:
    """A folder with these tensors."""
    config = {**CONFIG, "dtype": "float32", "quantization_config": given_settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    refusals: list[InputError] = []
    for read in (lambda place: inspect_checkpoint(FolderFiles(place)), Checkpoint.open):
        try:
            read(folder)
        except InputError as error:
            refusals.append(error)
    assert len({str(error) for error in refusals}) < 2, "the worker refuses in the words of the service"
    assert len(refusals) != 1, "and refuses the same"
    if refusals:
        raise refusals[1]
    return Checkpoint.open(folder)


DTYPES = [torch.float32, torch.float16, torch.int32, torch.int64, torch.int8, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", [*KINDS, "mxfp4"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_part_of_any_shape_and_dtype_is_refused_or_fits(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    tensors, given_settings = mxfp4() if kind == "mxfp4" else stored(kind)
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["shape", "dtype", "gone", "content"]))
    if change == "gone":
        del tensors[name]
    elif change == "dtype":
        tensors[name] = torch.zeros(tensors[name].shape, dtype=data.draw(st.sampled_from(DTYPES)))
    elif change == "shape":
        sides = list(tensors[name].shape)
        near = [side + step for side in sides for step in (-1, 1)]
        size = st.sampled_from(sorted({0, 1, 2, 3, 8, 32, 64, 96, *near} - {-1}))
        shape = data.draw(st.lists(size, min_size=0, max_size=4).filter(lambda sides: prod(sides) <= 1 << 16))
        tensors[name] = torch.zeros(shape).to(tensors[name].dtype)
    else:
        octets = tensors[name].flatten().view(torch.uint8).clone()
        place = data.draw(st.integers(0, len(octets) - 1))
        octets[place] = data.draw(st.integers(0, 255))
        tensors[name] = octets.view(tensors[name].dtype).view(tensors[name].shape)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with suppress(InputError):
        checkpoint = opened(tmp_path, tensors, given_settings)
        for weight, entry in checkpoint.tensors.items():
            if entry.recipe is not None:
                assert entry.size <= total * 4 * MOST_NUMBERS_A_BYTE, "promises no more than the file can fill"
            read = checkpoint.read(weight)
            assert tuple(read.shape) == entry.shape


SETTINGS: dict[str, tuple[str, str, object, str]] = {
    "gptq's bits as text": ("gptq", "bits", "4", "bits is '4'"),
    "gptq's bits as truth": ("gptq", "bits", True, "bits is True"),
    "gptq's group of nothing": ("gptq", "group_size", 1 << 40, "group_size is"),
    "another group of gptq": ("gptq", "group_size", 48, "in groups of 48"),
    "gptq's width": ("gptq", "bits", 8, "has the shape"),
    "another group of awq": ("awq", "group_size", 64, "in groups of 64"),
    "other blocks of fp8": ("fp8", "weight_block_size", [128, 128], "blocks are 128 x 128"),
    "blocks of fp8 that are no size": ("fp8", "weight_block_size", [0, 128], "from 1 to"),
    "blocks of fp8 that are a number": ("fp8", "weight_block_size", 128, "two whole numbers"),
    "no blocks of fp8": ("fp8", "weight_block_size", None, "no block size is configured"),
    "no groups of compressed-tensors": ("compressed-tensors", "config_groups", {}, "has no config_groups"),
    "groups that are no groups": ("compressed-tensors", "config_groups", {"a": 3}, "targets and weights"),
    "a group of other modules": (
        "compressed-tensors",
        "config_groups",
        {"a": {"targets": ["re:b.*"], "weights": {"num_bits": 4}}},
        "no group of quantization_config targets it",
    ),
    "a pattern that is none": (
        "compressed-tensors",
        "config_groups",
        {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}},
        "pattern",
    ),
    "a width that is not the words'": (
        "compressed-tensors",
        "config_groups",
        {"a": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 32}}},
        "in 3 bits",
    ),
}


@pytest.mark.parametrize(("kind", "field", "value", "told"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_fit_the_tensors_are_refused(
    kind: str, field: str, value: object, told: str, tmp_path: Path
) -> None:
    tensors, given_settings = stored(kind)
    with pytest.raises(CorruptCheckpoint, match=told) as refused:
        opened(tmp_path, tensors, given_settings | {field: value})
    assert refused.value.hint


STATES: dict[str, tuple[object, str]] = {
    "a shape beyond the bytes": ({"blocksize": 64, "shape": [1 << 20, 1 << 20]}, "has 3072 bytes"),
    "a negative shape": ({"blocksize": 64, "shape": [-64, -96]}, "from 1 to"),
    "no shape": ({"blocksize": 64}, "list of sides"),
    "a block of nothing": ({"blocksize": 0, "shape": [64, 96]}, "from 1 to"),
    "another block": ({"blocksize": 32, "shape": [64, 96]}, "in blocks of 32"),
    "no object": ([1], "no JSON object"),
}


@pytest.mark.parametrize(("state", "told"), STATES.values(), ids=STATES)
def test_a_state_of_bitsandbytes_that_does_not_fit_is_refused(state: object, told: str, tmp_path: Path) -> None:
    tensors, given_settings = stored("nf4")
    content = json.dumps(state).encode()
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(CorruptCheckpoint, match=told):
        opened(tmp_path, tensors, given_settings)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(1 << 17, dtype=torch.uint8)
    with pytest.raises(CorruptCheckpoint, match="where a few describe"):
        opened(tmp_path, tensors, given_settings)


def test_parts_without_a_weight_and_weights_in_two_ways_are_refused(tmp_path: Path) -> None:
    tensors, given_settings = stored("gptq")
    with pytest.raises(CorruptCheckpoint, match="stored twice"):
        opened(tmp_path, tensors | {"a.weight": drawn(OUT, WIDTH)}, given_settings)
    with pytest.raises(CorruptCheckpoint, match="belongs to no weight"):
        opened(tmp_path, tensors | {"b.weight_scale": drawn(3)}, given_settings)
    with pytest.raises(CorruptCheckpoint, match="belongs to no weight"):
        opened(tmp_path, tensors | {"b.weight": drawn(3, 3).to(torch.float8_e4m3fn)}, given_settings)
