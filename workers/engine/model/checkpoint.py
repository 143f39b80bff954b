"""A model folder, read lazily: safetensors or a GGUF file, every header checked before it is believed.

`app.domain.inputs.safetensors_header` holds each header against its file's size. Tensors are mapped from the file
when they are asked for, so that opening a 140 GB checkpoint costs a few megabytes. Pickled weights are never opened.

Weights that are stored quantized are presented as the numbers that they mean: under their own names, in the
configuration's dtype, made when they are read (`workers.engine.model.sources`).
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.domain.inputs.checkpoint_choice import WEIGHTS_FIELD, check_choice
from app.domain.inputs.config_numbers import check_numbers, header_bytes, names_of
from app.domain.inputs.foreign_files import GGUF_SUFFIX, INDEX, SINGLE, foreign_files, gguf_file
from app.domain.inputs.quantized.registry import read_quantized
from app.domain.inputs.safetensors_header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    header_length,
    parse_header,
)
from app.domain.inputs.side_files import check_side_files, read_object
from bitwright.errors import CorruptCheckpoint, SourceForbidden, SourceNotFound
from workers.engine.model.sources.gguf import GgufTensor, gguf_header
from workers.engine.model.sources.opening import Presented, present_gguf, present_safetensors
from workers.engine.model.sources.recipe import Recipe
from workers.formats.source_files import StoredBlocks

MAX_JSON_BYTES = 100_000_000
TIE = "tie_word_embeddings"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: its file, the file's name for its dtype, and its shape.

    recipe   how it is made, where it is not stored as it is; dtype and shape are then those that it is made in
    copies   the tensor of the file that it is another name of; None: it has its own
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe | None = None
    copies: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Checkpoint:
    """An open checkpoint folder: `config` (config.json, decoded) and `tensors` (name to place).

    folder      the files beside the weights: configuration, tokenizer, licence
    presented   what a quantized source is, and is presented as; None: every tensor is stored as it is
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        tensors: Mapping[str, StoredTensor],
        presented: Presented | None = None,
        settings: object = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.presented = presented
        self._settings = settings
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path, scratch: Path | None = None, made: Path | None = None) -> "Checkpoint":
        """Reads config.json and the headers of all weight files.

        scratch   where the files beside a quantized source's weights are put; None: a temporary folder
        made      a scratch folder of the same source, whose tokenizer is taken rather than made again

        Raises:
            SourceNotFound: there is no such folder, or no config.json or no weights in it.
            UnsafeCheckpoint, UnsupportedCheckpoint: it has pickled weights alone, or files of another kind.
            CorruptCheckpoint: a header or the index contradicts the files.
            SourceForbidden: the worker's user may not read them.
        """
        try:
            return cls._open_readable(folder, scratch, made)
        except PermissionError as error:
            hint = "let the user that the worker runs as read the folder and its files"
            detail = f"{Path(str(error.filename)).name} may not be read by the worker's user"
            raise SourceForbidden(detail, field="model", hint=hint) from error

    @classmethod
    def _open_readable(cls, folder: Path, scratch: Path | None, made: Path | None) -> "Checkpoint":
        config_file = folder / "config.json"
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        check_side_files(names, lambda name: (folder / name).stat().st_size)
        foreign = foreign_files(names)
        if foreign is not None:
            raise foreign.refusal("model")
        gguf = gguf_file(names)
        if gguf is not None:
            return cls._present(present_gguf(folder / gguf, scratch, made), {})
        if not config_file.is_file():
            hint = "name a folder that holds config.json and safetensors"
            raise SourceNotFound("the model's folder holds no config.json", field="model", hint=hint)
        config = read_json(config_file)
        check_numbers(config)
        # As transformers chooses: one file goes before an index, which may be left over from an earlier save.
        single = (folder / SINGLE).is_file() or not (folder / INDEX).is_file()
        tensors = _single_file_tensors(folder, config) if single else _indexed_tensors(folder, folder / INDEX, config)
        check_choice(names, SINGLE if single else INDEX, config)
        config.pop(WEIGHTS_FIELD, None)  # it names files of this folder, and results have their own
        stored = cls(folder, config, tensors)
        source = read_quantized(config, tensors, stored.content)
        if source is None:
            return stored
        places = {name: tensor.file for name, tensor in tensors.items()}
        presented = present_safetensors(folder, config, source, places, scratch)
        kept = {name: tensors[name] for name in source.kept}
        return cls._present(presented, kept, config.get("quantization_config"))

    @classmethod
    def _present(cls, presented: Presented, kept: Mapping[str, StoredTensor], settings: object = None) -> "Checkpoint":
        made = {
            name: StoredTensor(recipe.files[0], dtype, shape, recipe)
            for name, (dtype, shape, recipe) in presented.weights.items()
        }
        return cls(presented.folder.path, presented.config, {**kept, **made}, presented, settings)

    @property
    def index_dtype(self) -> str | None:
        """The dtype that the index of the files names; mostly there is none."""
        if any(file.name == SINGLE for file in self.files) or not (self.folder / INDEX).is_file():
            return None
        metadata = read_json(self.folder / INDEX).get("metadata")
        dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
        return dtype if isinstance(dtype, str) else None

    @property
    def has_copies(self) -> bool:
        """True if a tensor is another name of one of the files' (`untied`)."""
        return any(tensor.copies is not None for tensor in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors."""
        found: set[Path] = set()
        for entry in self.tensors.values():
            found.update((entry.file,) if entry.recipe is None else entry.recipe.files)
        return tuple(sorted(found))

    @property
    def size(self) -> int:
        """Bytes of all tensors, as they are read."""
        return sum(entry.size for entry in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The tensor on the host, memory-mapped; or made anew, where it is stored quantized.

        Raises:
            CorruptCheckpoint: the file does not hold what its header says.
        """
        entry = self.tensors[name]
        if entry.recipe is None:
            return self._stored(entry.file, entry.copies or name)
        try:
            return entry.recipe.make(self._stored)
        except OSError as error:
            detail = f"{entry.file.name}: cannot read {name}: {error.strerror}"
            raise CorruptCheckpoint(detail, field="model") from error

    def blocks(self, name: str) -> StoredBlocks | None:
        """The bytes of a tensor of a GGUF file, or of one that it holds besides, by the file's name; None of others."""
        entry = self.tensors.get(name)
        recipe: object = None if entry is None else entry.recipe
        if entry is None and self.presented is not None:
            recipe = self.presented.computed.get(name)
        return recipe.stored() if isinstance(recipe, GgufTensor) else None

    def content(self, name: str) -> bytes:
        """The bytes of a small tensor."""
        return bytes(self.read(name).contiguous().flatten().view(torch.uint8).numpy())

    def _stored(self, file: Path, name: str) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            words = error.strerror if isinstance(error, OSError) else error  # without the path on this machine
            raise CorruptCheckpoint(f"{file.name}: cannot read {name}: {words}", field="model") from error
        return tensor

    def without(self, names: Collection[str]) -> "Checkpoint":
        """The same folder as if it did not hold these tensors."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return Checkpoint(self.folder, self.config, kept, self.presented, self._settings) if names else self

    def untied(self, embeddings: str, head: str) -> "Checkpoint":
        """The same folder as if its head, which is the embedding matrix, were stored besides.

        embeddings, head   names of the tensors
        """
        copy = replace(self.tensors[embeddings], copies=self.tensors[embeddings].copies or embeddings)
        tensors = {**self.tensors, head: self.tensors.get(head, copy)}
        return Checkpoint(self.folder, with_tie(self.config, tied=False), tensors, self.presented, self._settings)

    def close(self) -> None:
        """Lets go of the mapped files."""
        self._open.clear()

    def digest(self, pin: str | None) -> str:
        """Identity of the weights without reading them: headers and sizes, and times unless `pin` names them."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        if self.presented is not None:
            digest.update(f"{self.presented.what}:{json.dumps(self._settings, sort_keys=True)}:".encode())
        for file in self.files:
            status = file.stat()
            digest.update(f"{file.name}:{status.st_size}:{pin or status.st_mtime_ns}:".encode())
            digest.update(_header_bytes(file))
        return digest.hexdigest()


def read_tensors(file: Path, config: Mapping[str, object] | None = None) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by its checked header.

    config   a decoded configuration, which can name so many of them; None: a file of this service's own

    Raises:
        CorruptCheckpoint: the header's length, JSON, dtypes, shapes or offsets contradict each other or the file.
    """
    room, most = (MAX_HEADER_BYTES,) * 2 if config is None else (header_bytes(config), names_of(config))
    entries = parse_header(_header_bytes(file, room), file.stat().st_size, file.name, most)
    return {name: StoredTensor(file, entry.dtype, entry.shape) for name, entry in entries.items()}


def _header_bytes(file: Path, most: int = MAX_HEADER_BYTES) -> bytes:
    with file.open("rb") as stream:
        if file.suffix.lower() == GGUF_SUFFIX:
            return stream.read(gguf_header(file).data)
        length = header_length(stream.read(LENGTH_BYTES), file.stat().st_size, file.name, most)
        return stream.read(length)


def with_tie(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """A configuration, decoded, that says whether head and embeddings are one matrix; so do its parts that say it."""
    parts = {name: with_tie(part, tied=tied) for name, part in config.items() if isinstance(part, dict) and TIE in part}
    return {**config, **parts, TIE: tied}


def read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CorruptCheckpoint(f"{file.name} is larger than {MAX_JSON_BYTES} bytes", field="model", value=file.name)
    return read_object(file.read_bytes(), file.name, "model")


def _single_file_tensors(folder: Path, config: Mapping[str, object]) -> dict[str, StoredTensor]:
    single = folder / SINGLE
    if single.is_file():
        return read_tensors(single, config)
    raise SourceNotFound(
        f"the model's folder holds neither {SINGLE} nor {INDEX}",
        field="model",
        hint="name a folder with safetensors weights",
    )


def _indexed_tensors(folder: Path, index: Path, config: Mapping[str, object]) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{index.name} has no weight_map", field="model", value=index.name)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted({_plain_name(index, name) for name in weight_map.values()}):
        if not (folder / name).is_file():
            raise CorruptCheckpoint(
                f"{index.name} names {name}, which is not in the folder",
                field="model",
                value=name,
                hint="fetch or upload the missing file",
            )
        # All tensors of a file, and those of the last file in the order of names, as transformers loads them.
        tensors |= read_tensors(folder / name, config)
    for tensor, name in weight_map.items():
        if tensor not in tensors:
            raise CorruptCheckpoint(
                f"{index.name} says that {tensor} is in {name}, where it is not, nor in another file that it names",
                field="model",
                value=tensor,
                hint="fetch or upload the file again",
            )
    return tensors


def _plain_name(index: Path, name: object) -> str:
    """A plain file name; anything that could leave the folder is refused."""
    plain = isinstance(name, str) and not set(name) & set("/\\:\0")
    if not plain or not str(name).endswith(".safetensors"):
        raise CorruptCheckpoint(
            f"{index.name}: {name!r} is not the plain name of a .safetensors file beside it",
            field="model",
            value=name,
            hint="name only files in the checkpoint's own folder",
        )
    return str(name)
