"""What a result takes over from its source: tensors that are not quantized, the tokenizer, the licence. Never code."""

import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from app.domain.errors import InternalError

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
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
    *LICENCES,
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


def check_tensor(source: SourceCheckpoint, name: str, tensor: Tensor) -> None:
    """Whether a tensor may take the place of the source's.

    Raises:
        InternalError: the source has no tensor of that name and shape.
    """
    if name not in source.tensors or tuple(source.tensors[name].shape) != tuple(tensor.shape):
        raise InternalError(f"the source checkpoint has no tensor {name} of this shape", field=name)


def copy_files(source: Path, target: Path, patterns: Sequence[str] = COPIED) -> None:
    """Copies the files of `source` that match one of the patterns; Python files never."""
    for file in sorted(source.iterdir()):
        wanted = any(fnmatchcase(file.name, pattern) for pattern in patterns) and file.suffix != ".py"
        if wanted and file.is_file():
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if patterns is COPIED and templates.is_dir():
        (target / templates.name).mkdir()
        for file in sorted(templates.glob("*.jinja")):
            shutil.copyfile(file, target / templates.name / file.name)


def licence_file(folder: Path) -> str | None:
    """Name of the licence in a folder, if there is one."""
    found = [file.name for file in folder.iterdir() if file.name.startswith(("LICENSE", "LICENCE"))]
    return min(found, default=None)
