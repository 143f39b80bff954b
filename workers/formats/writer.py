"""Write a checkpoint folder block by block: quantized linears as they come, everything else from the source.

    writer = CheckpointWriter(folder, ExportFormat.COMPRESSED_TENSORS, source)
    writer.add_linear("model.layers.0.mlp.up_proj", weight)      # any number of times
    writer.add_tensor("model.layers.0.input_layernorm.weight", tensor)
    writer.finish()
    writer.describe(report)

What is not quantized (embeddings, norms, biases, the head) is copied bit by bit unless `add_tensor` replaced it, and
so are the tokenizer, the generation configuration, the chat template and the licence. Code from the source (`*.py`)
never is.
"""

import shutil
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from app.domain.errors import InternalError
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from app.domain.report import Report
from workers.formats import compressed_tensors, native
from workers.formats.model_card import model_card
from workers.formats.shards import SHARD_BYTES, ShardWriter, write_json
from workers.numerics.quantized import AffineWeight

COPIED = (
    "tokenizer*",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""Files of the source that belong to the result too."""


class SourceCheckpoint(Protocol):
    """The original model: its folder, its config.json, and its tensors, read one at a time."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...
    def read(self, name: str) -> Tensor: ...


class CheckpointWriter:
    """One checkpoint in one format. `folder` is the writer's own: what an earlier attempt left in it is removed."""

    def __init__(
        self, folder: Path, export_format: ExportFormat, source: SourceCheckpoint, shard_bytes: int = SHARD_BYTES
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._format = export_format
        self._source = source
        stem = "weights" if export_format is ExportFormat.NATIVE else "model"
        self._shards = ShardWriter(folder, stem, shard_bytes)
        self._schemes: dict[str, Scheme] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._modules: dict[str, str] = {}
        self._replaced: set[str] = set()

    def add_linear(self, name: str, weight: AffineWeight, *, module: str | None = None) -> None:
        """Store a quantized linear.

        name      of the linear in the source checkpoint, without `.weight`; its tensors are called so again
        module    its name in the transformers model, where that differs

        Raises:
            FormatCannotHold: the format would have to change the weight.
        """
        if f"{name}.weight" not in self._source.tensors:
            raise InternalError(f"the source checkpoint has no tensor {name}.weight", field=name)
        compress = native.compress if self._format is ExportFormat.NATIVE else compressed_tensors.compress
        self._shards.add(compress(name, weight))
        self._schemes[name], self._dtypes[name] = weight.scheme, weight.dtype
        self._modules[name] = module or name

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        if name not in self._source.tensors or tuple(self._source.tensors[name].shape) != tuple(tensor.shape):
            raise InternalError(f"the source checkpoint has no tensor {name} of this shape", field=name)
        self._shards.add({name: tensor})
        self._replaced.add(name)

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Copy the rest of the checkpoint and write its configuration.

        ignored   module names of linears that stay as they are; those that the source's tensors tell are added
        """
        written = {f"{name}.weight" for name in self._schemes} | self._replaced
        for name in self._source.tensors:
            if name not in written:
                self._shards.add({name: self._source.read(name)})
        self._shards.finish()
        self._write_config(sorted({*ignored, *self._unquantized_matrices()} - self._targets().keys()))
        _copy_files(self._source.folder, self._folder)

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        write_json(self._folder / "report.json", report.model_dump(mode="json"))
        card = model_card(report, self._format, self._schemes, _licence_file(self._folder))
        (self._folder / "README.md").write_text(card, encoding="utf-8")
        return sorted(file for file in self._folder.rglob("*") if file.is_file())

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
        config = {**self._source.config, **self._dtype_fields()}
        if self._format is ExportFormat.NATIVE:
            write_json(self._folder / "bitwright.json", native.describe(self._schemes, self._dtypes))
        else:
            config["quantization_config"] = compressed_tensors.config(self._targets(), ignored)
        if self._format is ExportFormat.NATIVE or compressed_tensors.needs_loader(self._schemes.values()):
            shutil.copyfile(native.LOADER, self._folder / native.LOADER.name)
        write_json(self._folder / "config.json", config)

    def _targets(self) -> dict[str, Scheme]:
        """Schemes by module name, and by name in the checkpoint too where a runtime may go by that."""
        return self._schemes | {self._modules[name]: scheme for name, scheme in self._schemes.items()}

    def _dtype_fields(self) -> dict[str, str]:
        """The dtype that loaders take by default must be the one whose rounding the scales were made for."""
        found = {str(dtype).removeprefix("torch.") for dtype in self._dtypes.values()}
        if len(found) != 1:
            return {}
        older = "torch_dtype" if "torch_dtype" in self._source.config else "dtype"
        return {"dtype": min(found), older: min(found)}


def _copy_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        wanted = any(fnmatchcase(file.name, pattern) for pattern in COPIED) and file.suffix != ".py"
        if wanted and file.is_file():
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        (target / templates.name).mkdir()
        for file in sorted(templates.glob("*.jinja")):
            shutil.copyfile(file, target / templates.name / file.name)


def _licence_file(folder: Path) -> str | None:
    found = [file.name for file in folder.iterdir() if file.name.startswith(("LICENSE", "LICENCE"))]
    return min(found, default=None)
