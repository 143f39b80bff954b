"""Contents of a checkpoint folder, whatever its format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from app.domain.formats import ExportFormat
from bitwright.errors import FormatCannotHold, InternalError
from bitwright.report import Report
from tests.formats.examples import REPORT, Source, random_result, scheme, tiny_llama, write_quantized
from tests.reports import REPORTS
from workers.formats.registry import open_writer
from workers.numerics.quantized import LinearResult

CT, NATIVE = ExportFormat.COMPRESSED_TENSORS, ExportFormat.NATIVE
W4 = scheme(4, 32, True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_llama(tmp_path_factory.mktemp("source"))


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("export_format", [CT, NATIVE])
def test_what_is_not_quantized_is_copied_bit_for_bit(
    tmp_path: Path, source: Source, export_format: ExportFormat
) -> None:
    writer = open_writer(tmp_path / "out", export_format, source)
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W4))
    writer.finish()
    found = stored(tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight" not in found
    for name in source.tensors.keys() - {"model.layers.0.mlp.up_proj.weight"}:
        assert torch.equal(found.pop(name), source.tensors[name]), name
    assert all(name.startswith("model.layers.0.mlp.up_proj.") for name in found)


@pytest.mark.parametrize("export_format", [CT, NATIVE, ExportFormat.MERGED])
def test_a_tensor_that_quantization_changed_takes_the_place_of_the_source_s(
    tmp_path: Path, source: Source, export_format: ExportFormat
) -> None:
    """Every other tensor stays as it is; the linear's own is another."""
    name, linear = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj"
    writer = open_writer(tmp_path / "out", export_format, source)
    writer.add_tensor(name, source.tensors[name] * 2)
    writer.add_linear(linear, random_result((96, 64), W4))
    wrong = (
        (name, torch.ones(3)),
        ("model.nothing.weight", source.tensors[name]),
        ("model.layers.0.bias", torch.ones(64)),
    )
    for other, tensor in wrong:
        with pytest.raises(InternalError, match="of this shape"):
            writer.add_tensor(other, tensor)
    writer.finish()
    found = stored(tmp_path / "out")
    assert torch.equal(found[name], source.tensors[name] * 2)
    same = source.tensors.keys() - {name, f"{linear}.weight"}
    assert {n for n in found if not n.startswith(f"{linear}.")} == same | {name}
    assert all(torch.equal(found[other], source.tensors[other]) for other in same)


@pytest.mark.parametrize(("export_format", "stem"), [(CT, "model"), (NATIVE, "weights")])
def test_shards_are_small_and_indexed(tmp_path: Path, source: Source, export_format: ExportFormat, stem: str) -> None:
    write_quantized(source, tmp_path / "out", export_format, [W4], shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        assert tensors.keys() == {name for name, place in index["weight_map"].items() if place == file.name}
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        total += size
    assert index["metadata"]["total_size"] == total


def test_the_files_that_belong_to_a_model_come_along_and_code_does_not(tmp_path: Path, source: Source) -> None:
    write_quantized(source, tmp_path / "out", CT, [W4])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json", *REPORTS, "README.md", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_text()) == REPORT


def test_native_comes_with_its_loader_and_description(tmp_path: Path, source: Source) -> None:
    write_quantized(source, tmp_path / "out", NATIVE, [scheme(5, -1, False)])
    description = json.loads((tmp_path / "out" / "bitwright.json").read_text())
    expected = {"form": "affine", "bits": 5, "group_size": -1, "symmetric": False, "dtype": "bfloat16"}
    assert description["linears"]["model.layers.1.self_attn.q_proj"] == expected
    assert len(description["linears"]) == 14
    assert (tmp_path / "out" / "load_bitwright.py").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_config_names_every_linear_that_stays(tmp_path: Path, source: Source) -> None:
    writer = open_writer(tmp_path / "out", CT, source)
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W4))
    writer.finish(ignored=["model.vision"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    matrices = {name.removesuffix(".weight") for name, tensor in source.tensors.items() if tensor.ndim == 2}
    assert set(ignored) == matrices - {"model.layers.0.mlp.up_proj"} | {"lm_head", "model.vision"}
    assert config["dtype"] == "bfloat16"
    assert config["hidden_size"] == 64


def test_a_quantized_head_is_not_ignored(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", tied=False)
    writer = open_writer(tmp_path / "out", CT, source)
    writer.add_linear("lm_head", random_result((96, 64), W4))
    writer.finish()
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" not in ignored
    assert "model.layers.0.mlp.up_proj" in ignored


def test_a_module_under_another_name_is_targeted_by_both(tmp_path: Path, source: Source) -> None:
    writer = open_writer(tmp_path / "out", CT, source)
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W4), module="language.up_proj")
    writer.add_linear("model.layers.0.mlp.gate_proj", random_result((96, 64), scheme(8, -1, True)))
    writer.finish()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["model.layers.0.mlp.up_proj", "language.up_proj"], ["model.layers.0.mlp.gate_proj"]]
    assert not {"model.layers.0.mlp.up_proj", "language.up_proj"} & set(config["ignore"])


def test_what_an_earlier_attempt_left_is_gone(tmp_path: Path, source: Source) -> None:
    write_quantized(source, tmp_path / "out", CT, [W4], shard_bytes=20_000)
    first = write_quantized(source, tmp_path / "other", CT, [W4])
    write_quantized(source, tmp_path / "out", CT, [W4])
    assert first is not None
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in (tmp_path / "other").iterdir()
    )
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def test_a_scale_of_another_dtype_is_refused_not_rounded(tmp_path: Path, source: Source) -> None:
    weight = random_result((96, 64), W4, torch.float16).affine
    rounded = LinearResult(replace(weight, dtype=torch.bfloat16))
    with pytest.raises(FormatCannotHold, match=r"stores scales as torch\.bfloat16; these are torch\.float16"):
        open_writer(tmp_path / "out", CT, source).add_linear("model.layers.0.mlp.up_proj", rounded)
    open_writer(tmp_path / "out", NATIVE, source).add_linear("model.layers.0.mlp.up_proj", rounded)


@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_that_straddle_words_are_warned_of(tmp_path: Path, source: Source, bits: int) -> None:
    """The report takes the warnings of its writers: whoever loads the checkpoint needs a package that is new enough."""
    for name, export_format in (("packed", CT), ("native", NATIVE)):
        writer = open_writer(tmp_path / name, export_format, source)
        writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), scheme(bits, 32, True)))
        told = writer.warnings.get("needs_newer_package", "")
        assert (f"for {bits} bits" in told and "0.18.0 or newer" in told) is (
            export_format is CT and bits in (3, 5, 6, 7)
        )


def test_a_linear_that_the_source_lacks_or_that_comes_twice_is_an_error(tmp_path: Path, source: Source) -> None:
    writer = open_writer(tmp_path / "out", CT, source)
    with pytest.raises(InternalError, match=r"no tensor model\.up_proj\.weight"):
        writer.add_linear("model.up_proj", random_result((96, 64), W4))
    writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W4))
    with pytest.raises(ValueError, match="stored twice"):
        writer.add_linear("model.layers.0.mlp.up_proj", random_result((96, 64), W4))
