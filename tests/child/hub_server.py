"""A small Hub on loopback: the endpoints that huggingface_hub asks for a repository, and nothing else."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Contents of the server: repositories by "models/<id>" or "datasets/<id>", and the requests that it got."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""


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
        if self.served.broken:
            return self._send(503, b"{}", body)
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
        etag = hashlib.sha256(files[name]).hexdigest()
        return self._send(200, files[name], body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

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
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
        elif kind == "paths-info":
            found = []
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
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
            self.wfile.write(data)
