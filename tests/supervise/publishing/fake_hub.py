"""A Hub on loopback that speaks what huggingface_hub asks when it commits: info, preupload, LFS batch, PUT, commit."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("GET", "info", MODEL),
    ("GET", "info", rf"{MODEL}/revision/main"),
    ("GET", "commits", rf"{MODEL}/commits/main"),
    ("POST", "create", "/api/repos/create"),
    ("POST", "yaml", "/api/validate-yaml"),
    ("POST", "preupload", rf"{MODEL}/preupload/main"),
    ("POST", "batch", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("PUT", "put", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    ("POST", "verify", "/lfs/verify"),
    ("POST", "commit", rf"{MODEL}/commit/main"),
)


@dataclass
class Repository:
    """Files by path, and commits, last one first: (id, title)."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs"})
    commits: list[tuple[str, str]] = field(default_factory=lambda: [("a" * 40, "initial commit")])

    def commit(self, title: str) -> str:
        oid = hashlib.sha1(f"{title}{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits.insert(0, (oid, title))
        return oid


@dataclass
class FakeHub:
    """Repositories and large files. A fault of `faults[step]` is the answer to the next request of that step.

    during      called with the step and the hash of a file before its answer
    asked       number of requests by step, and by the hash of a file that was sent whole
    """

    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    during: Callable[[str, str], None] = lambda _step, _oid: None
    asked: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def info(self, repo: str) -> dict[str, Any]:
        there = self.repositories[repo]
        siblings = [{"rfilename": path} for path in there.files]
        return {"id": repo, "sha": there.commits[0][0], "private": there.private, "siblings": siblings, "tags": []}

    def commits(self, repo: str) -> list[dict[str, Any]]:
        about = {"message": "", "authors": [{"user": "x"}], "date": "2026-01-01T00:00:00.000Z"}
        return [{"id": oid, "title": title, **about} for oid, title in self.repositories[repo].commits]

    def create(self, body: dict[str, Any]) -> dict[str, str]:
        name = f"{body['organization']}/{body['name']}"
        private = body.get("private") or body.get("visibility") == "private"  # as older and newer clients say it
        self.repositories[name] = Repository(private=bool(private))
        return {"url": f"{self.url}/{name}"}

    def preupload(self, body: dict[str, Any]) -> dict[str, Any]:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in body["files"]
        ]
        return {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}

    def batch(self, body: dict[str, Any]) -> dict[str, Any]:
        def actions(oid: str) -> dict[str, Any]:
            verify = {"href": f"{self.url}/lfs/verify"}
            return {"actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": verify}}

        listed = [{**each, **({} if each["oid"] in self.objects else actions(each["oid"]))} for each in body["objects"]]
        return {"transfer": "basic", "objects": listed}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        there, header = self.repositories[repo], lines[0]["value"]
        if header.get("parentCommit") not in (None, there.commits[0][0]):
            return 412, {"error": "a commit happened since"}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                there.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                there.files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del there.files[value["path"]]
        oid = there.commit(header["summary"])
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def answer(self) -> None:
            path, length = self.path.partition("?")[0], int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(length)
            for method, step, pattern in ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    self._take(step, match.groupdict(), body)
                    return
            self._send(404, {"error": f"nothing at {path}"})

        do_GET = do_POST = do_PUT = answer  # noqa: N815 (the names that the server calls)

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            data = self.rfile.read(size)
            self.rfile.readline()
            return data

        def _take(self, step: str, names: dict[str, str], body: bytes) -> None:
            hub.asked[step] += 1
            hub.during(step, names.get("oid", ""))
            if hub.faults.get(step):
                status, headers = hub.faults[step].pop(0)
                self._send(status, {"error": "as the test wants it"}, headers)
            elif step == "put":
                assert hashlib.sha256(body).hexdigest() == names["oid"]
                hub.objects[names["oid"]] = body
                hub.asked[names["oid"]] += 1
                self._send(200, {})
            elif self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send(401, {"error": "Invalid username or password."})
            elif "repo" in names and names["repo"] not in hub.repositories:
                self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            else:
                self._send(*self._result(step, names, body))

        def _result(self, step: str, names: dict[str, str], body: bytes) -> tuple[int, Any]:
            if step == "commit":
                return hub.commit(names["repo"], [json.loads(line) for line in body.splitlines()])
            if step in ("yaml", "verify"):
                return 200, {"warnings": [], "errors": []}
            if step in ("info", "commits"):
                return 200, getattr(hub, step)(names["repo"])
            return 200, getattr(hub, step)(json.loads(body))

        def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def running(token: str) -> Iterator[FakeHub]:
    """A Hub on a free port."""
    hub = FakeHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
