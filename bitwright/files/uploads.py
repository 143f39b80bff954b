"""Files of an upload on this machine: the choice among them, their description, and their parts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bitwright.errors import RequestError
from bitwright.files.downloads import sha256_of
from bitwright.views import UploadFileSpec, UploadFileView, UploadView

PART_BYTES = 8 << 20
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Weights that the service refuses, since they run code when they are loaded."""


@dataclass(frozen=True)
class Chosen:
    """Files to send, and the entries of folders that are not sent, with the reason."""

    files: list[Path]
    left_out: dict[Path, str]


def choose_files(given: Sequence[Path]) -> Chosen:
    """The files that were named, and of each folder the files directly in it; an upload knows no folders.

    Left out of a folder: subfolders, hidden files, unfinished downloads, and pickled weights beside safetensors.
    """
    chosen = Chosen([], {})
    for path in given:
        if not path.is_dir():
            chosen.files.append(path)
            continue
        entries = sorted(path.iterdir())
        safe = any(entry.suffix == ".safetensors" for entry in entries)
        for entry in entries:
            why = _why_not(entry, safe=safe)
            if why is None:
                chosen.files.append(entry)
            elif why:
                chosen.left_out[entry] = why
    return chosen


def _why_not(entry: Path, *, safe: bool) -> str | None:
    """The reason why a folder's entry is not sent; "" where nobody would expect it to be."""
    if entry.name.startswith("."):
        return ""
    if entry.is_dir():
        return "a folder"
    if not entry.is_file():
        return "not a file"
    if entry.suffix == ".partial":
        return "an unfinished download"
    return "pickled; there are safetensors" if safe and entry.suffix in PICKLED else None


def describe_files(files: Sequence[Path]) -> list[UploadFileSpec]:
    """Name, size and SHA-256 of each file, as POST /v1/uploads wants them.

    Raises:
        RequestError: two files have the same name, one is not a file, or there are none.
    """
    if not files:
        hint = "name a .jsonl file, or the folder or the files of a model"
        raise RequestError("there are no files to send", field="files", hint=hint)
    names = [file.name for file in files]
    for file in files:
        if not file.is_file():
            hint = "name files; of a folder, all the files in it"
            raise RequestError(f"{file} is not a file", field="files", value=str(file), hint=hint)
        if names.count(file.name) > 1:
            hint = "an upload has no folders: send files of different names"
            raise RequestError(f"two files are named {file.name}", field="files", value=file.name, hint=hint)
    return [UploadFileSpec(name=file.name, size=file.stat().st_size, sha256=sha256_of(file)) for file in files]


def match_files(upload: UploadView, files: Sequence[Path]) -> list[tuple[UploadFileView, Path]]:
    """Each file of the upload with the local one of its name.

    Raises:
        RequestError: `files` are not those of the upload.
    """
    local = {file.name: file for file in files}
    for remote in upload.files:
        if remote.name not in local:
            hint = "name the same files as when the upload began"
            raise RequestError(f"upload {upload.id} wants a file named {remote.name}", field="files", hint=hint)
    return [(remote, local[remote.name]) for remote in upload.files]


def read_part(file: BinaryIO, offset: int, size: int) -> bytes:
    """The next bytes to send of a file of `size` bytes, PART_BYTES at the most.

    Raises:
        RequestError: the file has become shorter.
    """
    file.seek(offset)
    content = file.read(min(PART_BYTES, size - offset))
    if not content:
        path = Path(file.name)
        hint = "send it again when nothing writes to it any more"
        raise RequestError(f"{path} became shorter while it was sent", field="files", value=path.name, hint=hint)
    return content


def offset_reached(upload_offset: str | None, sent: int) -> int:
    """The offset that an answer's Upload-Offset names; `sent` where it names none."""
    return int(upload_offset) if upload_offset and re.fullmatch(r"[0-9]+", upload_offset) else sent
