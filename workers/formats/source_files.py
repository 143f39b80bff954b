"""Content that a result takes over from its source: unquantized tensors, the tokenizer, the licence; never code."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bitwright.errors import InternalError
from workers.formats.shards import write_json

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
COPIED = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "tekken.json",
    "*.tokenizer",
    "vocab*.json",
    "*vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "*SYSTEM_PROMPT.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "processor_config.json",
    *LICENCES,
)
"""Files of the source that belong to the result too: those that tokenizers and processors of transformers and
mistral-common read, and those that the licence requires."""
CODE = frozenset({".py", ".pyc", ".so", ".sh", ".js", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".h5"})
"""Suffixes that are never copied, whatever the name: programs, and files that run code when they are read."""
NAMES_OF_CODE = frozenset({"auto_map", "custom_pipelines"})
"""Keys of configurations that name classes in the repository's own Python files."""
IMPLEMENTATIONS = frozenset(
    {
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_impl"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("use_kernels", "kernel_config"),
    }
)
"""Keys of configurations that choose what computes, which may be a program that a loader fetches."""
MAX_CONFIG_BYTES = 50_000_000


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor as a GGUF file holds it: the number of its type, and its bytes, uint8 (..., bytes per row)."""

    kind: int
    data: Tensor


@runtime_checkable
class BlockSource(Protocol):
    """A source that is a GGUF file."""

    def blocks(self, name: str) -> StoredBlocks | None:
        """The bytes of a tensor by its name in the source, or of one that no parameter is made of by the file's."""
        ...


class SourceCheckpoint(Protocol):
    """The original model: its folder, its config.json, and its tensors, read one at a time."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...
    def read(self, name: str) -> Tensor: ...


def check_tensor(source: SourceCheckpoint, name: str, tensor: Tensor) -> None:
    """Checks that a tensor may take the place of the source's.

    Raises:
        InternalError: the source has no tensor of that name and shape.
    """
    if name not in source.tensors or tuple(source.tensors[name].shape) != tuple(tensor.shape):
        raise InternalError(f"the source checkpoint has no tensor {name} of this shape", field=name)


def copy_files(source: Path, target: Path, patterns: Sequence[str] = COPIED) -> None:
    """Copies the files of `source` that match one of the patterns; never code, nor a configuration's names of it."""
    for file in sorted(source.iterdir()):
        wanted = any(fnmatchcase(file.name, pattern) for pattern in patterns) and file.suffix.lower() not in CODE
        if wanted and file.is_file():
            _copy(file, target / file.name)
    templates = source / "additional_chat_templates"
    if patterns is COPIED and templates.is_dir():
        (target / templates.name).mkdir()
        for file in sorted(templates.glob("*.jinja")):
            shutil.copyfile(file, target / templates.name / file.name)


def without_code(config: Any) -> Any:
    """A configuration, decoded, without the names of code that is not copied, however deep they are nested.

    transformers would look for the code if `trust_remote_code` is set, and scripts set it for every model. Nor does it
    say which implementation computes: that is for whoever loads it.
    """
    return _without(config, NAMES_OF_CODE | IMPLEMENTATIONS)


def names_code(source: SourceCheckpoint) -> bool:
    """True if the source's configuration names code of its own."""
    return bool(_without(source.config, NAMES_OF_CODE) != source.config)


def _without(config: Any, keys: Collection[str]) -> Any:
    if isinstance(config, Mapping):
        return {key: _without(value, keys) for key, value in config.items() if key not in keys}
    return [_without(entry, keys) for entry in config] if isinstance(config, list) else config


def _copy(file: Path, target: Path) -> None:
    """Copies the same bytes, unless the file is a configuration that names code."""
    if file.name.endswith("_config.json") and file.stat().st_size <= MAX_CONFIG_BYTES:
        try:
            config = json.loads(file.read_bytes())
            cleaned = without_code(config)
        except (ValueError, RecursionError):  # not JSON: nothing reads names of code in it
            cleaned = config = None
        if cleaned != config:
            write_json(target, cleaned)
            return
    shutil.copyfile(file, target)


def licence_file(folder: Path) -> str | None:
    """Name of the licence in a folder, if there is one."""
    licences = [file.name for file in folder.iterdir() if file.name.startswith(("LICENSE", "LICENCE"))]
    return min(licences, default=None)
