"""Refusals before any weight: what the fetch reads of a repository, in bytes, on a Hub that counts them."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app.domain.attempt_lines import AttemptLine
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import HubModel
from app.hub.repository import Allowance, HubReader
from bitwright.errors import BitwrightError, DiskFull
from bitwright.events import LogEvent, WarningEvent
from tests.api.checkpoints import CONFIG, with_header
from tests.child.hub_server import COMMIT, Hole, Hub, running_hub
from workers.child import fetch
from workers.child.examination import require_disk
from workers.disk.orders import FetchOrder

BIG = {**CONFIG, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
BIG |= {"num_hidden_layers": 40, "vocab_size": 128_256}
INDEX = "model.safetensors.index.json"


def shard(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Hole:
    """A safetensors file with these tensors, of which only the header exists."""
    header, position = {}, 0
    width = 1 if dtype.startswith("F8") else 2
    for name, shape in shapes.items():
        size = width * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    start = with_header(header, 0)
    return Hole(len(start) + position, start)


def repository(
    config: Mapping[str, Any], shards: Mapping[str, Mapping[str, tuple[int, ...]]], dtype: str = "BF16"
) -> dict[str, Any]:
    """Files of a repository with these shards, their index, and copies of the weights that nobody needs."""
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    files: dict[str, Any] = {file: shard(shapes, dtype) for file, shapes in shards.items()}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    useless = {"pytorch_model.bin": Hole(1 << 36), "consolidated.00.safetensors": Hole(1 << 36)}
    return files | useless | {"config.json": json.dumps(config).encode(), INDEX: index, "tokenizer.json": b"{}"}


def large(config: Mapping[str, Any] | None = None, dtype: str = "BF16") -> dict[str, Any]:
    """A checkpoint of 93 GB in declared sizes."""
    shards = {
        f"model-{n:05d}-of-00040.safetensors": {
            **{f"model.layers.{n}.mlp.{kind}_proj.weight": (28672, 8192) for kind in ("gate", "up")},
            f"model.layers.{n}.mlp.down_proj.weight": (8192, 28672),
            f"model.layers.{n}.self_attn.all.weight": (56_000, 8192),
        }
        for n in range(40)
    }
    return repository(BIG | dict(config or {}), shards, dtype)


def small() -> dict[str, Any]:
    """A checkpoint of two tensors that are there."""
    shapes = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,)}
    files = repository(CONFIG, {"model-00001-of-00001.safetensors": shapes})
    name = "model-00001-of-00001.safetensors"
    return files | {name: files[name].part(0, len(files[name]) - 1)}


class Lines:
    """A report that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[AttemptLine] = []

    def write(self, line: AttemptLine) -> None:
        self.lines.append(line)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def brought(hub: Hub, folder: Path, fields: Mapping[str, Any], capacity: Mapping[str, int] | None = None) -> Lines:
    """The lines of a fetch of `org/model` for such a request; raises what it is refused for."""
    method = {} if "quantization" in fields else {"method": "signround"}
    request = JobRequest.parse({"model": "org/model", **method, **fields})
    assert isinstance(request.model, HubModel)
    known = dict(capacity or {})
    order = FetchOrder(model=request.model, models_folder=str(folder), request=request, capacity=known)
    lines = Lines()
    with httpx.Client() as client:
        reader = HubReader(client, Allowance(60, 64 << 20), hub.url, elsewhere=True)
        fetch.fetch_model(order, "org/model", COMMIT, reader, lines)  # type: ignore[arg-type]
    return lines


ROOM = {"host_memory_bytes": 1 << 40, "device_memory_bytes": 1 << 38, "disk_total_bytes": 1 << 45}
TIGHT = {"host_memory_bytes": 1 << 30, "device_memory_bytes": 1 << 30}
PATTERN = {"method": "signround", "modules": {"overrides": {"*.none": {"bits": 8}}}}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int], str]] = {
    "a wrong type": (large({"model_type": "unheard_of"}), {}, ROOM, "unsupported_architecture"),
    "quantized": (large({"quantization_config": {"quant_method": "x"}}), {}, ROOM, "unsupported_architecture"),
    "tensors of eight bits": (large(dtype="F8_E4M3"), {}, ROOM, "unsupported_architecture"),
    "a group size": (large(), {"group_size": 48}, ROOM, "group_size_does_not_divide"),
    "a format": (large({"model_type": "opt"}), {"formats": ["gguf"]}, ROOM, "format_cannot_hold"),
    "a pattern": (large(), {"quantization": PATTERN}, ROOM, "unknown_module"),
    "memory": (large(), {}, ROOM | TIGHT, "exceeds_capacity"),
    "the whole disk": (large(), {}, ROOM | {"disk_total_bytes": 1 << 32}, "exceeds_capacity"),
    "free disk": (large(), {"formats": ["merged"]}, ROOM, "disk_full"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_will_fail_is_refused_before_any_weight(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    files, fields, capacity, code = REFUSED[case]
    monkeypatch.setattr("workers.child.examination.shutil.disk_usage", lambda _: SimpleNamespace(free=60 << 30))
    hub.repositories["models/org/model"] = files
    with pytest.raises(BitwrightError) as refused:
        brought(hub, tmp_path, fields, capacity)
    assert refused.value.code == code
    headers = sum(len(data.start) for data in files.values() if isinstance(data, Hole))
    assert hub.bytes_of(".safetensors") <= headers, "headers, and not a byte of a weight"
    assert hub.bytes_of(".bin") == 0
    assert {method for method, _ in hub.requests} == {"GET"}, "huggingface_hub has not begun to download"


def test_a_large_model_of_a_wrong_type_costs_a_few_kilobytes(hub: Hub, tmp_path: Path) -> None:
    files = large({"model_type": "unheard_of"})
    assert 92e9 < sum(len(data) for name, data in files.items() if name.startswith("model-")) < 94e9
    hub.repositories["models/org/model"] = files
    with pytest.raises(BitwrightError, match="unheard_of"):
        brought(hub, tmp_path, {})
    assert sum(hub.given.values()) < 10_000
    assert [path.rpartition("/")[2] for _, path in hub.requests] == [COMMIT, "config.json"]


def test_a_model_that_fits_is_fetched_with_its_estimates_and_without_copies_of_its_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(fetch, "snapshot_download", lambda _, allow_patterns, **__: taken.extend(allow_patterns))
    hub.repositories["models/org/model"] = small()
    lines = brought(hub, tmp_path, {"group_size": 16}, ROOM).lines
    assert sorted(taken) == ["config.json", "model-00001-of-00001.safetensors", INDEX, "tokenizer.json"]
    (estimates,) = [line for line in lines if isinstance(line, LogEvent)]
    assert (estimates.event, estimates.fields["weights"]) == ("estimates", 128 * 64 + 64)
    assert estimates.fields["bytes_original"] == 2 * (128 * 64 + 64)
    assert estimates.fields["seconds_cpu"] is not None


def test_a_renamed_repository_is_fetched_under_its_name_with_a_warning(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fetch, "snapshot_download", lambda name, **_: asked.append(name))
    hub.repositories["models/new/name"] = small()
    hub.renamed["models/org/model"] = "models/new/name"
    lines = brought(hub, tmp_path, {"group_size": 16}).lines
    (warning,) = [line for line in lines if isinstance(line, WarningEvent)]
    assert warning.code == "repository_renamed"
    assert "org/model has been renamed to new/name" in warning.message
    assert asked == ["new/name"]


def test_a_disk_must_hold_the_download_and_the_results_beside_it(tmp_path: Path) -> None:
    require_disk(10, tmp_path, 10, tmp_path, "org/model")
    for download, results in ((1 << 60, 0), (0, 1 << 60)):
        with pytest.raises(DiskFull):
            require_disk(download, tmp_path, results, tmp_path, "org/model")
