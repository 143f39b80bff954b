"""Numbers of configurations, names in headers, files beside weights, rows of texts: what is believed, and what not."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from app.domain.inputs import jsonl, safetensors_header
from app.domain.inputs.config_numbers import check_numbers, header_bytes, names_of
from app.domain.inputs.inspection import FolderFiles, inspect_checkpoint
from app.domain.inputs.safetensors_header import header_length, parse_header
from app.domain.inputs.side_files import MOST_LEVELS, check_side_files, is_deep, read_object
from bitwright.errors import CorruptCheckpoint, InvalidDataset
from tests.api.checkpoints import write_checkpoint

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 4 scout": {"text_config": {"max_position_embeddings": 10_485_760, "num_hidden_layers": 48, "head_dim": 128}},
    "deepseek v3": {"num_hidden_layers": 61, "n_routed_experts": 256, "vocab_size": 129_280, "kv_lora_rank": 512},
    "kimi k2": {"num_hidden_layers": 61, "n_routed_experts": 384, "hidden_size": 7168, "rope_theta": 50_000},
    "a base of 10^11": {"rope_theta": 100_000_000_000, "rope_scaling": {"original_max_position_embeddings": 8192}},
    "gemma": {"vocab_size": 262_208, "intermediate_size": 21_504, "query_pre_attn_scalar": 168},
    "moe of -1": {"moe_layer_end_index": -1, "vision_feature_layer": -2, "eos_token_id": [1, 106]},
    "counts of its makers": {"num_parameters": 1 << 50, "total_flos": 10**15},
    "of a quantized source": {"quantization_config": {"group_size": 1 << 40}},
}


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_numbers_are_believed(config: dict[str, Any]) -> None:
    check_numbers(config)


def test_a_refusal_names_field_value_and_way_out() -> None:
    with pytest.raises(CorruptCheckpoint, match="ssm_state_size = 1073741824") as refused:
        check_numbers({"a": [{"ssm_state_size": 1 << 30}]})
    assert (refused.value.field, refused.value.value) == ("ssm_state_size", 1 << 30)
    assert "config.json" in str(refused.value.hint)


def test_the_names_that_a_configuration_has_room_for() -> None:
    dense, mixture = {"num_hidden_layers": 80}, PUBLISHED["deepseek v3"]
    # 723 tensors of Llama 3 70B, and 91,991 of DeepSeek-V3: 58 x 256 experts of three linears with a scale each.
    assert 723 < names_of(dense) < 20_000
    assert 91_991 < names_of(mixture) < 1_000_000
    assert names_of({}) == names_of({"num_hidden_layers": 1})
    assert header_bytes(dense) < 8 << 20
    assert header_bytes(mixture) > 91_991 * 150


def test_a_header_is_as_long_as_the_configuration_has_names() -> None:
    prefix = struct.pack("<Q", 1000)
    assert header_length(prefix, 5000, "a", 1000) == 1000
    with pytest.raises(CorruptCheckpoint, match="can name fill 999") as refused:
        header_length(prefix, 5000, "a", 999)
    assert refused.value.hint == safetensors_header.NAMED
    body = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in "abc"}).encode()
    assert len(parse_header(body, 8 + len(body), "a", 3)) == 3
    with pytest.raises(CorruptCheckpoint, match=r"config\.json can name 1"):
        parse_header(body, 8 + len(body), "a", 1)


def test_shards_have_no_more_names_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, shards=True)
    assert len(inspect_checkpoint(FolderFiles(folder)).tensors) == 2
    monkeypatch.setattr("app.domain.inputs.inspection.names_of", lambda _: 1)
    with pytest.raises(CorruptCheckpoint, match="have 2 tensors"):
        inspect_checkpoint(FolderFiles(folder))


def test_json_is_read_as_deep_as_anybody_writes_it() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert read_object(nested(MOST_LEVELS), "f", "f")
    with pytest.raises(CorruptCheckpoint, match="levels deep"):
        read_object(nested(MOST_LEVELS + 2), "f", "f")
    with pytest.raises(CorruptCheckpoint, match="not JSON"):
        read_object(nested(100_000), "f", "f")
    assert not is_deep([[1]], 2)
    assert is_deep([[[1]]], 1)


def test_a_folder_of_very_many_files_is_no_checkpoint() -> None:
    check_side_files((str(number) for number in range(10_000)), lambda _: 1)
    with pytest.raises(CorruptCheckpoint, match="10001 files"):
        check_side_files((str(number) for number in range(10_001)), lambda _: 1)


@pytest.mark.parametrize(("limit", "told"), [("MAX_ROWS", "more than 3 rows"), ("MAX_TEXT_BYTES", "more than 3 bytes")])
def test_a_text_has_so_many_rows_and_bytes(monkeypatch: pytest.MonkeyPatch, limit: str, told: str) -> None:
    assert (jsonl.MAX_ROWS, jsonl.MAX_TEXT_BYTES) == (1_000_000, 1_000_000_000)
    row = b'{"text": "a"}\n'
    assert jsonl.check_jsonl(io.BytesIO(3 * row), "f") == 3
    monkeypatch.setattr(jsonl, limit, 3)
    with pytest.raises(InvalidDataset, match=told) as refused:
        jsonl.check_jsonl(io.BytesIO(4 * row), "f")
    assert refused.value.hint == jsonl.LESS
