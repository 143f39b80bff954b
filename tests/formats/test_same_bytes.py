"""The same result is the same bytes in every format: one entry of metadata a safetensors file, keys in one order."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from app.domain.adapters import QBaRASpec
from app.domain.formats import ExportFormat, LowRankRule
from tests.formats.examples import REPORT, held_by, random_result, scheme, tiny_llama, write_with
from workers.adapters.attaching import Attach, stored
from workers.engine.model.checkpoint import Checkpoint
from workers.formats.adapter_file import describe_adapter, write_adapter
from workers.formats.cards.identity import Identity
from workers.formats.registry import open_writer, open_writers
from workers.tiny_model import Recipe, make_tiny_model

W4 = scheme(4, 32, True)


def one_entry_at_most(folder: Path) -> int:
    """Number of safetensors files in it, each held to the rule."""
    files = sorted(folder.rglob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert len(opened.metadata() or {}) <= 1, file.name
    return len(files)


def assert_same_bytes(first: Path, second: Path) -> None:
    names = sorted(str(file.relative_to(first)) for file in first.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(second)) for file in second.rglob("*") if file.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_several_entries_come_in_an_order_of_their_own() -> None:
    """The reason for the rule; should safetensors sort them one day, it may go."""
    entries = {f"key{number}": "value" for number in range(8)}
    assert len({save({"x": torch.zeros(1)}, metadata=entries) for _ in range(20)}) > 1
    assert len({save({"x": torch.zeros(1)}, metadata={"key": "value"}) for _ in range(20)}) == 1


@pytest.mark.parametrize("export_format", [name for name in ExportFormat if "*.safetensors" in name.info.weight_files])
def test_every_format_of_safetensors(export_format: ExportFormat, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    made = held_by(export_format, rank=0 if export_format.info.low_rank is LowRankRule.BESIDE else 2)
    for name in ("first", "second"):
        writer = open_writers(tmp_path / name, (export_format,), source)[export_format]
        write_with(writer, source, made, export_format)
    assert one_entry_at_most(tmp_path / "first") >= 1
    assert_same_bytes(tmp_path / "first", tmp_path / "second")


def test_the_adapter_file_with_the_base_that_it_names(tmp_path: Path) -> None:
    results = {f"layer.{n}": random_result((48, 64), W4, seed=n) for n in range(6)}
    adapters = Attach(QBaRASpec(rank=4))(results, seed=1)
    for name in ("first", "second"):
        write_adapter(tmp_path / name, "q-bara", {key: stored(module) for key, module in adapters.items()})
        describe_adapter(tmp_path / name, "q-bara", REPORT)
    assert one_entry_at_most(tmp_path / "first") == 1
    assert_same_bytes(tmp_path / "first", tmp_path / "second")


def test_a_gguf_file(tmp_path: Path) -> None:
    recipe = Recipe(vocabulary=400, width=64, intermediate=64, blocks=1, positions=64, steps=30, batch=1, length=16)
    source = Checkpoint.open(make_tiny_model(tmp_path / "source", recipe))
    for name in ("first", "second"):
        file = open_writer(
            tmp_path / name, ExportFormat.GGUF, source, (ExportFormat.GGUF,), identity=Identity.of(REPORT)
        )
        file.add_linear("model.layers.0.self_attn.o_proj", random_result((64, 64), W4, torch.float16))
        file.finish()
        file.describe(REPORT)
    assert_same_bytes(tmp_path / "first", tmp_path / "second")
