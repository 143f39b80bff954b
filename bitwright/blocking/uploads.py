# Made from bitwright/asynchronous/uploads.py by `make client`: change it there.
"""Files to the service in parts. A part that was lost is sent again from the offset that the service names."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from bitwright.blocking.transport import Transport
from bitwright.blocking.waits import in_thread, sleep
from bitwright.errors import Conflict, RequestInProgress, Unavailable
from bitwright.files.downloads import OnBytes
from bitwright.files.uploads import match_files, offset_reached, read_part
from bitwright.views import UploadFileView, UploadView


def send_files(transport: Transport, upload: UploadView, files: Sequence[Path], on_bytes: OnBytes) -> UploadView:
    """Send what the service does not have yet, and complete the upload.

    Raises:
        RequestError: `files` are not those of the upload.
        Unavailable: parts failed more often in a row than the retry policy allows.
    """
    for remote, path in match_files(upload, files):
        _send_file(transport, upload.id, remote, path, on_bytes)
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
            content = in_thread(read_part, file, offset, remote.size)
            reached = _send_part(transport, url, content, offset, remote.size)
            failures = 0 if reached > offset else failures + 1
            if failures >= transport.retry.attempts:
                raise Unavailable(f"the service takes no more of {remote.name} after {offset} bytes")
            if failures:
                sleep(transport.retry.delay(failures))
            on_bytes(reached - offset)
            offset = reached


def _send_part(transport: Transport, url: str, content: bytes, offset: int, size: int) -> int:
    """Send one part; returns the offset that the service has reached, even if its answer was lost."""
    end = offset + len(content)
    headers = {"Content-Range": f"bytes {offset}-{end - 1}/{size}"}
    try:
        response = transport.send("PUT", url, content=content, headers=headers)
    except Conflict:
        # A previous try of this part did arrive, though its answer was lost.
        response = transport.send("HEAD", url)
    return offset_reached(response.headers.get("Upload-Offset"), end)
