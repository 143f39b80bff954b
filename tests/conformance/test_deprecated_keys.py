"""Checkpoints load by the keys that stay when transformers drops the old ones, and cards use no deprecated one.

Other releases of transformers are `benchmarks/loading/transformers_releases.py`'s.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging as their_logging

from app.domain.formats import ExportFormat
from tests.conformance.test_formats import assert_logits_agree, assert_weights_equal, load_unpacked
from tests.formats.examples import Source, scheme, tiny_llama, write_quantized

CT = ExportFormat.COMPRESSED_TENSORS
WIDTHS = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, -1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Records that transformers logs, its once-only warnings included."""
    their_logging.warning_once.cache_clear()
    their_logging.add_handler(caplog.handler)
    yield caplog
    their_logging.remove_handler(caplog.handler)


def without(file: Path, key: str) -> None:
    """Drop a key of the quantization's configuration, as a release that no longer knows it does."""
    config = json.loads(file.read_text())
    del config["quantization_config"][key]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("key", ["run_compressed", "dequantize"])
@pytest.mark.parametrize(("bits", "group"), WIDTHS)
def test_either_key_alone_loads_zero_points(tmp_path: Path, source: Source, key: str, bits: int, group: int) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, [scheme(bits, group, False)])
    without(tmp_path / "out/config.json", key)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_weights_equal(model, expected)
    assert_logits_agree(model, expected)


def test_neither_key_fails(tmp_path: Path, source: Source) -> None:
    """Or they would not be needed, and could go."""
    write_quantized(source, tmp_path / "out", CT, [scheme(4, 32, False)])
    for key in ("run_compressed", "dequantize"):
        without(tmp_path / "out/config.json", key)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_unpacked_as_the_card_says_nothing_deprecated_is_logged(
    tmp_path: Path, source: Source, logged: pytest.LogCaptureFixture
) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, [scheme(4, 32, True)])
    assert_weights_equal(load_unpacked(tmp_path / "out"), expected)
    assert [record for record in logged.records if "deprecated" in record.getMessage()] == []
    # The key that old releases need is told of by new ones.
    write_quantized(source, tmp_path / "asymmetric", CT, [scheme(4, 32, False)])
    logged.set_level(logging.WARNING)
    load_unpacked(tmp_path / "asymmetric")
    assert any("`run_compressed` is deprecated" in record.getMessage() for record in logged.records)
