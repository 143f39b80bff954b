"""From durable blocks and trained adapters to checkpoints: each linear once through its merge and every writer."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from app.domain.formats import ExportFormat
from bitwright.events import Stage
from bitwright.formats import ADAPTER_FOLDER
from bitwright.report import AdapterReport, Report
from workers.adapters.attaching import report, stored
from workers.adapters.merging import MergeProof
from workers.engine.device.read_ahead import read_ahead
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.finished_blocks import FinishedBlocks
from workers.engine.reporter import Reporter
from workers.engine.shipped import TrainedAdapters
from workers.formats.adapter_file import describe_adapter, write_adapter
from workers.formats.cards.identity import Identity
from workers.formats.format import Writer
from workers.formats.registry import open_writers
from workers.numerics.quantized import LinearResult, StoredBits


@dataclass
class Exported:
    """What was written.

    blocks            how many were written
    stored, weights   bits of all quantized linears as they ship, and how many weights they are
    """

    writers: Mapping[ExportFormat, Writer]
    blocks: int
    stored: StoredBits = field(default_factory=StoredBits)
    weights: int = 0
    adapter: AdapterReport | None = None


@dataclass(frozen=True)
class Export:
    """What the export works with; `ignored` are linears that stay as they are, `identity` is what the job makes."""

    model: StreamedModel
    folder: Path
    formats: tuple[ExportFormat, ...]
    ignored: tuple[str, ...]
    trained: TrainedAdapters | None
    reporter: Reporter
    identity: Identity | None = None

    def write(self, state: FinishedBlocks) -> Exported:
        """Every checkpoint but its report; a block is read while the one before it is packed.

        Raises:
            FormatCannotHold: a format would have to change a weight.
            MisalignedAdapter, OffsetNotRepresentable: an adapter cannot be folded in.
        """
        total, bases, proofs = len(state.blocks), dict[str, LinearResult](), list[MergeProof]()
        writers = open_writers(self.folder, self.formats, self.model.checkpoint, self.identity)
        exported = Exported(writers, total)
        with closing(read_ahead(state.load, total, torch.device("cpu"))) as blocks:
            for done, block in enumerate(blocks, start=1):
                for name, base in block.items():
                    self._write_linear(name, base, exported, proofs)
                if self.trained is not None:
                    bases |= {name: _outline(base) for name, base in block.items() if name in self.trained.modules}
                for name, tensor in state.parameters(done - 1).items():
                    for writer in exported.writers.values():
                        writer.add_tensor(self.model.sources[name], tensor)
                self.reporter.progress(Stage.EXPORT, done, total + 1, "blocks")
        for writer in exported.writers.values():
            writer.finish(ignored=self.ignored)
            for code, message in writer.warnings.items():
                self.reporter.warning(code, message)
        if self.trained is not None:
            trained = self.trained
            exported.adapter = report(trained.spec, trained.modules, bases, proofs, trained.merge)
            kept = {name: stored(module) for name, module in trained.modules.items()}
            write_adapter(self.folder / ADAPTER_FOLDER, trained.spec.kind, kept)
        return exported

    def describe(self, exported: Exported, told: Report) -> dict[str, str]:
        """The report into every checkpoint; their folders by format, relative to the workspace."""
        for writer in exported.writers.values():
            writer.describe(told)
        names = [name.value for name in exported.writers]
        if self.trained is not None:
            describe_adapter(self.folder / ADAPTER_FOLDER, self.trained.spec.kind, told, self.model.checkpoint.folder)
            names.append(ADAPTER_FOLDER)
        self.reporter.progress(Stage.EXPORT, exported.blocks + 1, exported.blocks + 1, "blocks")
        return {name: f"{self.folder.name}/{name}" for name in names}

    def _write_linear(self, name: str, base: LinearResult, exported: Exported, proofs: list[MergeProof]) -> None:
        result = base
        if self.trained is not None:
            made = self.trained.finished(name, base)
            result = made.result
            proofs += [] if made.proof is None else [made.proof]
        exported.stored += result.stored_bits()
        exported.weights += result.weight.codes.numel()
        source = self.model.sources[f"{name}.weight"].removesuffix(".weight")
        for writer in exported.writers.values():
            writer.add_linear(source, result, module=name)


def _outline(result: LinearResult) -> LinearResult:
    """The result without its codes, which the report only counts."""
    return LinearResult(replace(result.weight, codes=result.weight.codes.to("meta")))
