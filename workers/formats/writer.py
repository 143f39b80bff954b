"""Write a checkpoint folder block by block: quantized linears as they come, everything else from the source.

    writers = open_writers(folder, (ExportFormat.MERGED, ExportFormat.PEFT), source)
    writer.add_linear("model.layers.0.mlp.up_proj", result)      # of each writer, any number of times
    writer.add_tensor("model.layers.0.input_layernorm.weight", tensor)
    writer.finish()
    writer.describe(report)

What is not quantized (embeddings, norms, biases, the head) is copied bit by bit unless `add_tensor` replaced it, and
so are the tokenizer, the generation configuration, the chat template and the licence. Code from the source (`*.py`)
never is, and neither are the names by which its configurations call that code.

Where `peft` is among the formats of a job, every checkpoint but `native` holds the quantized base alone.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from app.domain.format_rules import base_alone, model_problems
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from bitwright.errors import FormatCannotHold, InternalError
from bitwright.report import Report
from workers.formats import compressed_tensors, merged, native
from workers.formats.cards.identity import Identity
from workers.formats.cards.model_card import describe
from workers.formats.cards.runtimes import dense_words_warning, straddling
from workers.formats.gguf import file as gguf_file
from workers.formats.peft_adapter import AdapterWriter
from workers.formats.shards import SHARD_BYTES, ShardWriter, write_json
from workers.formats.source_files import SourceCheckpoint, check_tensor, copy_files, without_code
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import LinearResult

COMPRESS: MappingProxyType[ExportFormat, Callable[[str, LinearResult], dict[str, Tensor]]] = MappingProxyType(
    {
        ExportFormat.NATIVE: native.compress,
        ExportFormat.COMPRESSED_TENSORS: compressed_tensors.compress,
        ExportFormat.MERGED: merged.compress,
    }
)
"""What a linear becomes, in the formats that are whole checkpoints of safetensors."""


class Writer(Protocol):
    """One export of a job. `folder` is the writer's own: what an earlier attempt left in it is removed."""

    def add_linear(self, name: str, result: LinearResult, *, module: str | None = None) -> None: ...
    def add_tensor(self, name: str, tensor: Tensor) -> None: ...
    def finish(self, *, ignored: Collection[str] = ()) -> None: ...
    def describe(self, report: Report) -> list[Path]: ...

    @property
    def warnings(self) -> Mapping[str, str]:
        """Code and message of what the caller should know, after the last linear."""
        ...


def open_writers(
    folder: Path, formats: Collection[ExportFormat], source: SourceCheckpoint, identity: Identity | None = None
) -> Mapping[ExportFormat, Writer]:
    """A writer for each format of a job, in a folder of its name under `folder`.

    identity   what the job makes, for files that say so before there is a report
    """
    return {name: _open(folder / name.value, name, source, formats, identity) for name in formats}


def check_model(
    formats: tuple[ExportFormat, ...], source: SourceCheckpoint, model_type: str, inputs: Mapping[str, int]
) -> None:
    """Whether the formats can hold a model, before anything is computed.

    inputs   in_features of every linear that is to be quantized, by full name

    Raises:
        FormatCannotHold: one of them cannot.
    """
    for problem in model_problems(formats, model_type, inputs, source.config):
        hint = "leave the format out, or change what its detail names; GET /v1/formats lists what each one holds"
        raise FormatCannotHold(problem.detail, field=problem.field, value=problem.value, hint=hint)
    if ExportFormat.GGUF in formats:
        gguf_file.check_source(source)


def _open(
    folder: Path,
    name: ExportFormat,
    source: SourceCheckpoint,
    formats: Collection[ExportFormat],
    identity: Identity | None,
) -> Writer:
    if name is ExportFormat.PEFT:
        return AdapterWriter(folder, source, formats)
    if name is ExportFormat.GGUF:
        return gguf_file.GGUFFile(folder, source, formats, identity)
    return CheckpointWriter(folder, name, source, formats=formats)


class CheckpointWriter:
    """One checkpoint in one format; `formats` are all of its job's."""

    def __init__(
        self,
        folder: Path,
        export_format: ExportFormat,
        source: SourceCheckpoint,
        shard_bytes: int = SHARD_BYTES,
        *,
        formats: Collection[ExportFormat] = (),
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._format = export_format
        self._formats = formats
        self._source = source
        stem = "weights" if export_format is ExportFormat.NATIVE else "model"
        self._shards = ShardWriter(folder, stem, shard_bytes)
        self._linears: dict[str, StoredLinear] = {}
        self._modules: dict[str, str] = {}
        self._replaced: set[str] = set()

    def add_linear(self, name: str, result: LinearResult, *, module: str | None = None) -> None:
        """Store a quantized linear.

        name      of the linear in the source checkpoint, without `.weight`; its tensors are called so again
        module    its name in the transformers model, where that differs

        Raises:
            FormatCannotHold: the format would have to change the weight.
        """
        if f"{name}.weight" not in self._source.tensors:
            raise InternalError(f"the source checkpoint has no tensor {name}.weight", field=name)
        if base_alone(self._formats) and self._format is not ExportFormat.NATIVE:
            result = LinearResult(result.weight)
        self._shards.add(COMPRESS[self._format](name, result))
        self._linears[name] = StoredLinear.of(result)
        self._modules[name] = module or name

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        check_tensor(self._source, name, tensor)
        self._shards.add({name: tensor})
        self._replaced.add(name)

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Copy the rest of the checkpoint and write its configuration.

        ignored   module names of linears that stay as they are; those that the source's tensors tell are added
        """
        written = {f"{name}.weight" for name in self._linears} | self._replaced
        for name in self._source.tensors:
            if name not in written:
                self._shards.add({name: self._source.read(name)})
        self._shards.finish()
        self._write_config(sorted({*ignored, *self._unquantized_matrices()} - self._targets().keys()))
        copy_files(self._source.folder, self._folder)

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        return describe(self._folder, report, self._format, self._linears, self._formats, self._source)

    @property
    def warnings(self) -> Mapping[str, str]:
        """What loading needs; nothing is rounded here."""
        widths = straddling(self._schemes().values()) if self._format is ExportFormat.COMPRESSED_TENSORS else []
        return {"needs_newer_package": dense_words_warning(widths)} if widths else {}

    def _unquantized_matrices(self) -> Iterable[str]:
        """Modules with a matrix that is not quantized: other linears, and embeddings, where listing does no harm.

        A tied head has no tensor of its own, but it is a module of the class Linear.
        """
        yield "lm_head"
        for name in self._source.tensors:
            module = name.removesuffix(".weight")
            if module != name and len(self._source.tensors[name].shape) == 2:
                yield module

    def _write_config(self, ignored: list[str]) -> None:
        config = {**without_code(self._source.config), **self._dtype_fields()}
        loader = self._format is ExportFormat.NATIVE
        if self._format is ExportFormat.NATIVE:
            write_json(self._folder / "bitwright.json", native.describe(self._linears))
        elif self._format is ExportFormat.COMPRESSED_TENSORS:
            config["quantization_config"] = compressed_tensors.config(self._targets(), ignored)
            loader = compressed_tensors.needs_loader(self._schemes().values())
        if loader:
            shutil.copyfile(native.LOADER, self._folder / native.LOADER.name)
        write_json(self._folder / "config.json", config)

    def _schemes(self) -> dict[str, Scheme]:
        return {name: linear.scheme for name, linear in self._linears.items()}

    def _targets(self) -> dict[str, Scheme]:
        """Schemes by module name, and by name in the checkpoint too where a runtime may go by that."""
        return self._schemes() | {self._modules[name]: scheme for name, scheme in self._schemes().items()}

    def _dtype_fields(self) -> dict[str, str]:
        """The dtype that loaders take by default must be the one whose rounding the scales were made for."""
        found = {linear.dtype for linear in self._linears.values()}
        if len(found) != 1:
            return {}
        older = "torch_dtype" if "torch_dtype" in self._source.config else "dtype"
        return {"dtype": min(found), older: min(found)}
