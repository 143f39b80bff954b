"""Finished parts on disk, so that a killed attempt costs at most the part in hand.

    state/weights-only/part-00000.json     what the part holds: its shards by format, with sha256, and its report
    state/weights-only/<format>/...        shards, which become the checkpoint's own at the end, without a copy

A part's shards are durable before its file names them. An attempt adopts parts only in order from the first, only under
its own fingerprint, and only where every shard is as it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.domain.formats import ExportFormat
from bitwright.report import LinearReport
from workers.disk.durable import replace_file, sync_folder
from workers.formats.written_part import WrittenPart
from workers.numerics.quantized import StoredBits


class FinishedLinear(BaseModel):
    """A quantized linear, and the seconds that it took."""

    model_config = ConfigDict(frozen=True)

    report: LinearReport
    seconds: float


class FinishedPart(BaseModel):
    """A durable part.

    written   by format
    bits      of its quantized linears, by what they hold (`StoredBits`)
    scales    by format: the largest relative error of scales that it stores rounded, up to this part
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    index: int
    written: dict[str, WrittenPart]
    linears: tuple[FinishedLinear, ...]
    bits: dict[str, int] = Field(default_factory=dict)
    scales: dict[str, float] = Field(default_factory=dict)

    @property
    def stored(self) -> StoredBits:
        return StoredBits(**self.bits)

    @property
    def errors(self) -> dict[ExportFormat, float]:
        """`scales` as `StoredScales` has them."""
        return {ExportFormat(name): error for name, error in self.scales.items()}


class FinishedParts:
    """The parts of one job in a folder of its workspace."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._fingerprint = fingerprint
        self.parts: list[FinishedPart] = []
        self.resumed = 0

    def adopt(self, holds: Callable[[Mapping[str, WrittenPart]], bool]) -> None:
        """Take over the parts of an earlier attempt up to the first that is not whole."""
        while (part := self._read(len(self.parts))) is not None and holds(part.written):
            self.parts.append(part)
        self.resumed = len(self.parts)

    def finish(
        self,
        written: Mapping[str, WrittenPart],
        linears: tuple[FinishedLinear, ...],
        bits: StoredBits,
        scales: Mapping[str, float],
    ) -> None:
        """Add the next part. Returns when a crash can no longer lose it."""
        for name in written:
            sync_folder(self.folder / name)
        part = FinishedPart(
            fingerprint=self._fingerprint,
            index=len(self.parts),
            written=dict(written),
            linears=linears,
            bits=asdict(bits),
            scales=dict(scales),
        )
        replace_file(self._file(part.index), part.model_dump_json().encode())
        self.parts.append(part)

    def _file(self, index: int) -> Path:
        return self.folder / f"part-{index:05d}.json"

    def _read(self, index: int) -> FinishedPart | None:
        try:
            part = FinishedPart.model_validate_json(self._file(index).read_bytes())
        except (OSError, ValidationError):
            return None
        return part if (part.fingerprint, part.index) == (self._fingerprint, index) else None
