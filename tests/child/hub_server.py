"""A small Hub on loopback: the endpoints that huggingface_hub asks for a repository, and nothing else.

It answers ranges, redirects a repository that has another name, limits requests, and counts the bytes that it gives by
path. A file may be a `Hole`: a size that is said, of which only the beginning is there to be read.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000
"""Bytes from which a file is kept in the store, where there is one."""


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass(frozen=True)
class Hole:
    """A large file of which only the first bytes are there; whoever reads on gets zeros."""

    size: int
    start: bytes = b""

    def __len__(self) -> int:
        return self.size

    def part(self, first: int, last: int) -> bytes:
        """Bytes `first` to `last`, both included."""
        return self.start[first : last + 1].ljust(last + 1 - first, b"\0")


def part_of(data: "bytes | Hole", first: int, last: int) -> bytes:
    """Bytes `first` to `last` of a file, both included."""
    return data.part(first, last) if isinstance(data, Hole) else data[first : last + 1]


@dataclass
class Hub:
    """Contents of the server: repositories by "models/<id>" or "datasets/<id>", and the requests that it got."""

    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    store: str = ""
    """Where large files are, if not here: the address of another server."""
    broken: bool = False
    says_sizes: bool = True
    """Whether a repository's description has its files' sizes; their list always has."""
    retry_after: str | None = None
    answering: threading.Event = field(default_factory=_set)
    """Cleared: every request waits."""
    given: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies by path."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def bytes_of(self, ending: str) -> int:
        """Bytes given of files whose names end so."""
        return sum(count for path, count in self.given.items() if path.endswith(ending))


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the block is left."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.answering.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        wanted = self.rfile.read(length)
        self._answer(body=True, wanted=wanted)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool, wanted: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.served.requests.append((self.command, path))
        self.served.tokens.add(self.headers.get("Authorization", ""))
        self.served.answering.wait(30)
        if self.served.broken:
            return self._send(503, b"{}", body)
        if self.served.retry_after is not None:
            return self._send(429, b"{}", body, {"Retry-After": self.served.retry_after})
        for old, new in self.served.renamed.items():
            if old.partition("/")[2] in path:
                moved = self.path.replace(old.partition("/")[2], new.partition("/")[2])
                return self._send(307, b"{}", body, {"Location": moved})
        repository, rest = self._find(path)
        if repository is None:
            return self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
        if repository in self.served.gated:
            return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "terms"})
        files = self.served.repositories[repository]
        if path.startswith("api/"):
            return self._describe(repository, rest, files, body)
        name = rest.removeprefix("resolve/").partition("/")[2]
        if name not in files:
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no"})
        return self._file(files[name], body)

    def _file(self, data: "bytes | Hole", body: bool) -> None:
        etag = hashlib.sha256(data.start if isinstance(data, Hole) else data).hexdigest()
        known = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.served.store and len(data) > LARGE:
            return self._send(302, b"", body, {**known, "Location": self.served.store + self.path})
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, part_of(data, 0, len(data) - 1), body, known)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last or len(data) - 1), len(data) - 1)
        known["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        return self._send(206, part_of(data, int(first), end), body, known)

    def _find(self, path: str) -> tuple[str | None, str]:
        plain = path.removeprefix("api/")
        if not plain.startswith(("models/", "datasets/")):
            plain = "models/" + plain
        for repository in self.served.repositories:
            if plain == repository or plain.startswith(repository + "/"):
                return repository, plain.removeprefix(repository).strip("/")
        return None, ""

    def _describe(self, repository: str, rest: str, files: dict[str, bytes], body: bool) -> None:
        kind, _, revision = rest.partition("/")
        revision = revision.split("/")[0]
        if revision not in ("", "main", COMMIT):
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"})
        if kind == "tree":
            found: object = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(n.encode()).hexdigest()}
                for n, d in files.items()
            ]
        elif kind == "paths-info":
            found = []
        else:
            size = (lambda data: {"size": len(data)}) if self.served.says_sizes else (lambda _: {})
            siblings = [{"rfilename": name, **size(data)} for name, data in files.items()]
            name = repository.partition("/")[2]
            found = {"id": name, "_id": "1", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            found |= {"downloads": 0, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z"}
        return self._send(200, json.dumps(found).encode(), body, {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.served.given[unquote(urlsplit(self.path).path)] += len(data)
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked may have given up
                self.wfile.write(data)
