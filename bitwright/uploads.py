"""Files to the service in parts. A part that was lost is sent again from the offset that the service names."""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from bitwright.downloads import OnBytes, sha256_of
from bitwright.errors import Conflict, RequestError, RequestInProgress, Unavailable
from bitwright.transport import Transport
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


def send_files(transport: Transport, upload: UploadView, files: Sequence[Path], on_bytes: OnBytes) -> UploadView:
    """Send what the service does not have yet, and complete the upload.

    Raises:
        RequestError: `files` are not those of the upload.
        Unavailable: parts failed more often in a row than the retry policy allows.
    """
    local = {file.name: file for file in files}
    for remote in upload.files:
        if remote.name not in local:
            hint = "name the same files as when the upload began"
            raise RequestError(f"upload {upload.id} wants a file named {remote.name}", field="files", hint=hint)
        _send_file(transport, upload.id, remote, local[remote.name], on_bytes)
    return _complete(transport, upload.id)


def _complete(transport: Transport, upload_id: str) -> UploadView:
    """Wait until the service has checked every byte, however long that takes: it reports that it is still checking."""
    while True:
        with suppress(RequestInProgress):
            headers = {"Idempotency-Key": f"complete-{upload_id}"}
            response = transport.send("POST", f"/v1/uploads/{upload_id}/complete", headers=headers)
            return UploadView.model_validate_json(response.content)


def _send_file(transport: Transport, upload_id: str, remote: UploadFileView, path: Path, on_bytes: OnBytes) -> None:
    url = f"/v1/uploads/{upload_id}/files/{quote(remote.name, safe='')}"
    offset, failures = remote.offset, 0
    on_bytes(offset)
    with path.open("rb") as file:
        while offset < remote.size:
            file.seek(offset)
            content = file.read(min(PART_BYTES, remote.size - offset))
            if not content:
                hint = "send it again when nothing writes to it any more"
                raise RequestError(
                    f"{path} became shorter while it was sent", field="files", value=path.name, hint=hint
                )
            reached = _send_part(transport, url, content, offset, remote.size)
            failures = 0 if reached > offset else failures + 1
            if failures >= transport.retry.attempts:
                raise Unavailable(f"the service takes no more of {remote.name} after {offset} bytes")
            if failures:
                time.sleep(transport.retry.delay(failures))
            on_bytes(reached - offset)
            offset = reached


def _send_part(transport: Transport, url: str, content: bytes, offset: int, size: int) -> int:
    """Send one part; returns the offset that the service has reached, even if its answer was lost."""
    content_range = f"bytes {offset}-{offset + len(content) - 1}/{size}"
    try:
        response = transport.send("PUT", url, content=content, headers={"Content-Range": content_range})
    except Conflict:
        # A previous try of this part did arrive, though its answer was lost.
        response = transport.send("HEAD", url)
    reached = response.headers.get("Upload-Offset", "")
    return int(reached) if re.fullmatch(r"[0-9]+", reached) else offset + len(content)
