"""Writer of safetensors shards: a shard goes to disk as soon as it is full."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 * 1024**3
"""Bytes held on the host before a shard is written; the Hub and most file systems take files of 4 GB."""


class ShardWriter:
    """Collects tensors and writes `<stem>-00001-of-00003.safetensors` ..., or one `<stem>.safetensors`.

    Until `finish`, when their number is known, shards have the suffix `.partial`.
    """

    def __init__(self, folder: Path, stem: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._stem = stem
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self.total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors, in the order given; they may lie on any device.

        Raises:
            ValueError: a name was stored before.
        """
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"tensor {name} is stored twice")
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._shard_bytes:
                self._flush()
            # A view would keep its whole storage alive, and safetensors refuses tensors that share one.
            self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._names.add(name)
            self._pending_bytes += size
            self.total_bytes += size

    def finish(self) -> list[Path]:
        """Write the last shard, give every shard its name and write the index, if there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        files = []
        for number, (partial, names) in enumerate(self._shards, start=1):
            suffix = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            file = partial.rename(self._folder / f"{self._stem}{suffix}.safetensors")
            weight_map |= dict.fromkeys(names, file.name)
            files.append(file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", index)
        return files

    def _flush(self) -> None:
        file = self._folder / f"{self._stem}-{len(self._shards) + 1:05d}.safetensors.partial"
        save_file(self._pending, file, metadata={"format": "pt"})
        with file.open("rb") as written:
            os.fsync(written.fileno())
        self._shards.append((file, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


def write_json(file: Path, content: object) -> None:
    """Indented JSON with a newline at its end; key order as given, so that equal content gives equal bytes."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
