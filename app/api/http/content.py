"""Bytes over HTTP: strong validators, one range, digests (RFC 9110 sections 13 and 14, RFC 9530)."""

import base64
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bitwright.errors import PreconditionFailed, RangeNotSatisfiable

RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*")
IMMUTABLE = "private, max-age=31536000, immutable"
"""An artifact's id never stands for other bytes, so its caller's cache may keep them."""
REVALIDATED = "private, no-cache"
"""For what changes under its name: a cache may keep it, and asks each time whether it is still the same."""


@dataclass(frozen=True)
class Span:
    """Bytes from `start`, `length` of them."""

    start: int
    length: int


class Unsatisfiable(RangeNotSatisfiable):
    """`range_not_satisfiable` with the header that states the size."""

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail, field="Range", hint=f"the content has {size} bytes")
        self.headers = {"Content-Range": f"bytes */{size}"}


def parse_range(value: str, size: int) -> Span | None:
    """The one range of a Range header; None where it is to be ignored: malformed, another unit, or several ranges.

    Raises:
        Unsatisfiable: it lies outside the content.
    """
    match = RANGE.fullmatch(value)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = min(int(match[2]), size)
        if length == 0:
            raise Unsatisfiable("the last 0 bytes are no range", size)
        return Span(size - length, length)
    start, end = int(match[1]), int(match[2]) if match[2] else size - 1
    if match[2] and end < start:
        return None
    if start >= size:
        raise Unsatisfiable(f"the range starts at byte {start}", size)
    return Span(start, min(end, size - 1) - start + 1)


def etag_among(header: str, etag: str) -> bool:
    """True if a list of entity tags holds this strong one; `*` holds every one."""
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or etag in tags


def conditions(headers: Headers, etag: str) -> bool:
    """True if the caller has the content already, so that 304 is the answer.

    Raises:
        PreconditionFailed: If-Match names other content.
    """
    wanted = headers.get("if-match")
    if wanted is not None and not etag_among(wanted, etag):
        raise PreconditionFailed(f"the content is {etag}", field="If-Match", value=wanted)
    have = headers.get("if-none-match")
    # Weak comparison, as the RFC asks for here.
    return have is not None and etag_among(have.replace("W/", ""), etag)


def selected_span(headers: Headers, etag: str, size: int) -> Span | None:
    """The part that the request asks for; None for all of it."""
    asked, validator = headers.get("range"), headers.get("if-range")
    if asked is None or (validator is not None and validator.strip() != etag):
        return None
    return parse_range(asked, size)


def representation_headers(etag: str, filename: str, cache: str) -> dict[str, str]:
    """Headers that hold for the whole content, whatever part of it is sent."""
    return {"ETag": etag, "Cache-Control": cache, "Content-Disposition": attachment(filename)}


def attachment(filename: str) -> str:
    """Content-Disposition with the name in ASCII and, where that is not all of it, in UTF-8 (RFC 6266)."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in filename)
    header = f'attachment; filename="{plain}"'
    return header if plain == filename else f"{header}; filename*=UTF-8''{quote(filename, safe='')}"


def sha256_digest(sha256: str) -> str:
    """The value of Repr-Digest for a hexadecimal SHA-256."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def stream(chunks: Iterator[bytes], length: int, *, media_type: str, headers: dict[str, str], status: int) -> Response:
    """An answer of known length that is sent while it is read."""
    every = {**headers, "Content-Length": str(length)}
    return _ClosingResponse(chunks, status_code=status, media_type=media_type, headers=every)


class _ClosingResponse(StreamingResponse):
    """Closes what it reads from even when the caller goes away; Starlette leaves that to the collector."""

    def __init__(self, chunks: Iterator[bytes], **options: Any) -> None:
        super().__init__(chunks, **options)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self._chunks, Generator):
                self._chunks.close()
