"""Finished checkpoints of an export, read by the worker's runtimes where that is asked for."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from app.domain.formats import ExportFormat
from app.limited.process import LimitedProcess
from tests.engine.conftest import run_job
from tests.engine.exports.orders import export
from tests.formats.examples import codebook_made, tiny_llama, write_quantized
from workers.runtimes.order import FILE_BYTES, HOST

RUNTIMES = {name: {"version": version(name)} for name in ("transformers", "peft")}


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Fields of an order whose worker reads in transformers and peft."""
    with LimitedProcess.start(HOST, folder=tmp_path_factory.mktemp("reading"), file_bytes=FILE_BYTES) as child:
        handle = child.handle
        warm = {"orders": handle.orders, "answers": handle.answers, "pid": handle.pid}
        yield {"runtimes": RUNTIMES, "warm": warm}


@pytest.mark.slow
def test_the_files_are_read_where_the_export_asks_for_it(
    small_model: Path, tmp_path: Path, reads: dict[str, Any]
) -> None:
    base = run_job(small_model, tmp_path / "base", formats=["native"], evaluation=None)
    native = tmp_path / "base" / base.checkpoints["native"]
    formats = ["compressed-tensors", "gguf"]
    report = export(native, tmp_path / "work", formats, verify="files", order=reads, bits=4, group_size=32).report
    packed, gguf = report.loads
    assert (packed.format, packed.runtime, packed.read, packed.result) == (
        "compressed-tensors",
        "transformers",
        "files",
        "loads",
    )
    assert packed.tokens_written == 16
    assert (gguf.format, gguf.read, gguf.result) == ("gguf", "files", "not_checked")
    assert report.seconds["verify"] > 0
    assert "transformers" in (tmp_path / "work/output/compressed-tensors/README.md").read_text()
    unasked = export(native, tmp_path / "other", formats, order=reads, bits=4, group_size=32).report
    assert unasked.loads == ()
    assert "verify" not in unasked.seconds


@pytest.mark.slow
def test_an_adapter_is_read_beside_its_base(tmp_path: Path, reads: dict[str, Any]) -> None:
    source = tiny_llama(tmp_path / "source")
    write_quantized(source, tmp_path / "base" / "native", ExportFormat.NATIVE, [codebook_made(4, 32, rank=2)])
    native, spec = tmp_path / "base" / "native", {"method": "loftq", "evaluation": None}
    both = export(native, tmp_path / "both", ["merged", "peft"], verify="files", order=reads, **spec).report
    assert [(load.format, load.result) for load in both.loads] == [("merged", "loads"), ("peft", "loads")]
    (alone,) = export(native, tmp_path / "alone", ["peft"], verify="files", order=reads, **spec).report.loads
    assert (alone.format, alone.read, alone.result) == ("peft", "files", "not_checked")
    assert "ask for merged" in str(alone.detail)
