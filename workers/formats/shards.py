"""Writer of safetensors shards: a shard goes to disk as soon as it is full, and what does not fit in memory before."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from workers.formats.streamed_shard import ALIGNMENT, StreamedShard, bytes_of, room_of

SHARD_BYTES = 2 * 1024**3
"""Bytes of a shard; the Hub and most file systems take files of 4 GB."""
HELD_BYTES = 256 * 1024**2
"""Bytes held on the host before a shard is written while it grows."""
ROOM_SHARE = 256
LEAST_ROOM = 4096
"""A header has a 256th of that as its room, at least; a shard with more tensors than it takes ends."""


class FinishedShard(BaseModel):
    """A durable shard under its first name, without folder: its tensors in order, their bytes, the file's sha256."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str
    names: tuple[str, ...]
    size: int


class ShardWriter:
    """Collects tensors and writes `<stem>-00001-of-00003.safetensors` ..., or one `<stem>.safetensors`.

    Until `finish`, when their number is known, shards have the suffix `.partial`.

    held_bytes   more than this is not held: a shard that is larger is written as it grows
    parts        folder of the shards until then, and afterwards, too: what lies there can be adopted by another writer.
                 None: the folder of the checkpoint
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        shard_bytes: int = SHARD_BYTES,
        *,
        held_bytes: int = HELD_BYTES,
        parts: Path | None = None,
    ) -> None:
        self._folder, self._parts = folder, parts
        self._stem = stem
        self._shard_bytes, self._held_bytes = shard_bytes, held_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._shard_size = 0, 0
        self._stream: StreamedShard | None = None
        self._streamed: list[str] = []
        self._shards: list[FinishedShard] = []
        self._sealed = 0
        self._names: set[str] = set()
        self.total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors, in the order given; they may lie on any device.

        Raises:
            ValueError: a name was stored before.
        """
        for name, tensor in tensors.items():
            size = bytes_of(tensor)
            self._make_way(name, tensor.dim(), size)
            if self._streams(size):
                self._opened().write(name, tensor.detach().to("cpu"))
                self._streamed.append(name)
                continue
            # A view would keep its whole storage alive, and safetensors refuses tensors that share one.
            self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            self._pending_bytes += size
            if self._pending_bytes > self._held_bytes:
                self._spill()

    @contextmanager
    def growing(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator["Pieces"]:
        """A tensor that comes in pieces, the only one until the context ends.

        Raises:
            ValueError: a name was stored before, or the pieces are not the whole tensor.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._streams(size):
            self._make_way(name, len(shape), size)
            stream = self._opened()
            stream.begin(name, dtype, shape)
            self._streamed.append(name)
            yield Pieces([], stream)
            return
        held: list[Tensor] = []
        yield Pieces(held, None)
        self.add({name: torch.cat([piece.flatten() for piece in held]).to(dtype).view(shape)})

    def seal(self) -> tuple[FinishedShard, ...]:
        """Write what is held; the shards since the last time, which are durable."""
        if self._pending or self._stream is not None:
            self._flush()
        since, self._sealed = self._shards[self._sealed :], len(self._shards)
        return tuple(since)

    def adopt(self, shards: Sequence[FinishedShard]) -> None:
        """Go on after shards that another writer has sealed in the same folder of parts."""
        for shard in shards:
            self._shards.append(shard)
            self._names |= set(shard.names)
            self.total_bytes += shard.size
        self._sealed = len(self._shards)

    def holds(self, shard: FinishedShard) -> bool:
        """True if the shard lies in the folder as it was sealed."""
        try:
            return _sha256(self._place / Path(shard.file).name) == shard.sha256
        except OSError:
            return False

    def finish(self) -> list[Path]:
        """Write the last shard, give every shard its name and write the index, if there are several."""
        if self._pending or self._stream is not None or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        files = []
        for number, shard in enumerate(self._shards, start=1):
            suffix = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            file = self._named(self._place / shard.file, self._folder / f"{self._stem}{suffix}.safetensors")
            weight_map |= dict.fromkeys(shard.names, file.name)
            files.append(file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", index)
        return files

    def abandon(self) -> None:
        """Let go of a shard that will not be finished."""
        if self._stream is not None:
            self._stream.abandon()

    @property
    def _place(self) -> Path:
        return self._folder if self._parts is None else self._parts

    def _named(self, partial: Path, file: Path) -> Path:
        """The shard under its last name; where it is to stay under the first one too, as another link to its bytes."""
        if self._parts is not None:
            try:
                os.link(partial, file)
            except OSError:  # the file system has no links: an attempt after this one begins anew
                return partial.rename(file)
            return file
        return partial.rename(file)

    def _streams(self, size: int) -> bool:
        """True for a tensor that is too large to be held, and may stand before any other."""
        return size > self._held_bytes and size % ALIGNMENT == 0

    def _make_way(self, name: str, dimensions: int, size: int) -> None:
        """End the shard if the tensor does not fit into it, and count the tensor."""
        if name in self._names:
            raise ValueError(f"tensor {name} is stored twice")
        full = self._shard_size > 0 and self._shard_size + size > self._shard_bytes
        if full or (self._stream is not None and not self._stream.takes(self._room() + room_of(name, dimensions))):
            self._flush()
        self._names.add(name)
        self._shard_size += size
        self.total_bytes += size

    def _room(self) -> int:
        """Characters of a header for what is held."""
        return sum(room_of(name, tensor.dim()) for name, tensor in self._pending.items())

    def _opened(self) -> StreamedShard:
        """The file of the shard; a new one has room for what is held, and for as much again."""
        if self._stream is None:
            room = max(self._held_bytes // ROOM_SHARE, LEAST_ROOM, 2 * self._room())
            self._stream = StreamedShard(self._next(), room)
        return self._stream

    def _spill(self) -> None:
        """Write what is held, and may stand before anything, to the file of the shard."""
        stream = self._opened()
        for name, tensor in list(self._pending.items()):
            if bytes_of(tensor) % ALIGNMENT == 0:
                stream.write(name, tensor)
                self._streamed.append(name)
                del self._pending[name]
                self._pending_bytes -= bytes_of(tensor)
        if self._pending_bytes > self._held_bytes:
            self._flush()

    def _next(self) -> Path:
        return self._place / f"{self._stem}-{len(self._shards) + 1:05d}.safetensors.partial"

    def _flush(self) -> None:
        if self._stream is None:
            file = self._next()
            save_file(self._pending, file, metadata={"format": "pt"})
            with file.open("rb") as written:
                os.fsync(written.fileno())
        else:
            file = self._stream.file
            for name, tensor in sorted(self._pending.items(), key=lambda item: -item[1].element_size()):
                self._stream.write(name, tensor)
            self._stream.close()
        names = (*self._streamed, *self._pending)
        sha256 = "" if self._parts is None else _sha256(file)
        self._shards.append(FinishedShard(file=file.name, sha256=sha256, names=names, size=self._shard_size))
        self._stream, self._streamed, self._pending = None, [], {}
        self._pending_bytes, self._shard_size = 0, 0


class Pieces:
    """Takes the pieces of one tensor."""

    def __init__(self, held: list[Tensor], stream: StreamedShard | None) -> None:
        self._held, self._stream = held, stream

    def append(self, piece: Tensor) -> None:
        """The next elements, in the order in which they lie."""
        if self._stream is None:
            self._held.append(piece.detach().to("cpu", copy=True))
        else:
            self._stream.append(piece.detach().to("cpu"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: object) -> None:
    """Indented JSON with a newline at its end; key order as given, so that equal content gives equal bytes."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
