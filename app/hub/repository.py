"""A model repository on the Hub, looked at without being fetched: its commit, its files' sizes, and parts of them.

The two requests of the Hub's protocol that this takes (huggingface_hub 2.4 makes the same ones):

    GET /api/models/{id}/revision/{revision}?blobs=true     commit, and name and size of every file
    GET /{id}/resolve/{commit}/{file}, with Range           bytes of a file; large ones by a redirect to their store

What comes back is a stranger's: sizes are checked, and no more bytes are read than asked for, whatever the server says.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx

from app.domain.request.sources import HUB_ID
from app.hub.answers import refusal_of
from bitwright.errors import Unavailable, UnsupportedCheckpoint

HUB = "https://huggingface.co"
CONNECT_SECONDS = 10.0
MOST_FILES = 100_000
MOST_REDIRECTS = 5
MISLED = "ask the operator to look at BITWRIGHT_HUB_ENDPOINT"
AWAY = "the job is tried again by itself; on a machine without network use a local path or an upload"


class Allowance:
    """Time and bytes that may still be spent on a look; shared by the threads that spend them."""

    def __init__(self, seconds: float, bytes_left: int) -> None:
        self.seconds, self.bytes_left = seconds, bytes_left
        self._lock = Lock()
        self._deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end.

        Raises:
            Unavailable: there are none.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"the Hub takes more than {self.seconds:.0f} seconds", field="model", hint=AWAY)
        return left

    def take(self, count: int) -> None:
        """Count bytes that have come.

        Raises:
            UnsupportedCheckpoint: they are more than may be read for a look.
        """
        with self._lock:
            self.bytes_left -= count
        if self.bytes_left < 0:
            detail = "configuration, index and headers of the repository are larger than what is read to judge a model"
            raise UnsupportedCheckpoint(detail, field="model", hint="use a local path or an upload")


@dataclass(frozen=True)
class HubReader:
    """Reads from one endpoint.

    client      an httpx client; it follows no redirects by itself
    elsewhere   whether redirects to other hosts are followed, where the Hub keeps large files; no token goes there
    """

    client: httpx.Client
    allowance: Allowance
    endpoint: str = HUB
    token: str | None = None
    elsewhere: bool = False

    def repository(self, repo_id: str, revision: str) -> "Repository":
        """A model repository as the Hub describes it.

        Raises:
            SourceNotFound, SourceGated, SourceForbidden: it does not give it.
            HubRateLimited, Unavailable: it does not answer now.
        """
        path = f"/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
        found = _described(self._json(path, repo_id), repo_id)
        if all(size is not None for size in found.sizes.values()):
            return found
        path = f"/api/models/{found.id}/tree/{found.commit}?recursive=true&expand=false"
        return replace(found, sizes=dict(found.sizes) | _tree_sizes(self._json(path, repo_id), repo_id))

    def read(self, repository: "Repository", name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes of a file from `start`; raises as `repository`."""
        path = f"/{repository.id}/resolve/{repository.commit}/{quote(name)}"
        ranged = {"Range": f"bytes={start}-{start + length - 1}"}
        with self._got(path, repository.id, ranged) as answer:
            skipped = 0 if answer.status_code == httpx.codes.PARTIAL_CONTENT else start
            found = bytearray()
            for chunk in self._chunks(answer):
                found += chunk
                if len(found) >= skipped + length:
                    break
        return bytes(found[skipped : skipped + length])

    def _json(self, path: str, repo_id: str) -> Any:
        with self._got(path, repo_id, {}) as answer:
            body = b"".join(self._chunks(answer))
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            detail = "the Hub's answer is not JSON"
            raise Unavailable(detail, field="model", value=repo_id, hint=MISLED) from error

    def _chunks(self, answer: httpx.Response) -> Iterator[bytes]:
        for chunk in answer.iter_raw(1 << 16):
            self.allowance.take(len(chunk))
            yield chunk
            _ = self.allowance.left

    @contextmanager
    def _got(self, path: str, repo_id: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The answer to a GET, redirects followed."""
        url, own = self.endpoint.rstrip("/") + path, urlsplit(self.endpoint).netloc
        try:
            for _ in range(MOST_REDIRECTS + 1):
                known = {"Authorization": f"Bearer {self.token}"} if self.token and urlsplit(url).netloc == own else {}
                wait = httpx.Timeout(self.allowance.left, connect=min(CONNECT_SECONDS, self.allowance.left))
                asked = {"Accept-Encoding": "identity", **headers, **known}
                with self.client.stream("GET", url, headers=asked, timeout=wait) as answer:
                    if not answer.has_redirect_location:
                        if answer.status_code >= httpx.codes.BAD_REQUEST:
                            raise refusal_of(answer.status_code, answer.headers, "model", repo_id)
                        yield answer
                        return
                    url = self._next(url, answer.headers["location"], own, repo_id)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable("the Hub cannot be reached", field="model", value=repo_id, hint=AWAY) from error
        raise Unavailable("the Hub redirects in a circle", field="model", value=repo_id, hint=AWAY)

    def _next(self, url: str, location: str, own: str, repo_id: str) -> str:
        target = urljoin(url, location)
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or (parts.netloc != own and not self.elsewhere):
            detail = "the Hub points to another host, which is not asked"
            raise Unavailable(detail, field="model", value=repo_id, hint=AWAY)
        return target


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: its id as it is now, and its files' sizes by path; None where the Hub says none."""

    id: str
    commit: str
    sizes: Mapping[str, int | None]

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if they are not known."""
        return self.sizes.get(name) or 0


@dataclass(frozen=True)
class HubFiles:
    """The files at the top of a repository, as `CheckpointFiles`."""

    reader: HubReader
    repository: Repository

    def names(self) -> Sequence[str]:
        """Plain names; folders hold nothing of a checkpoint, except where there is nothing else."""
        plain = sorted(name for name in self.repository.sizes if "/" not in name)
        return plain if any(name.endswith(".safetensors") for name in plain) else sorted(self.repository.sizes)

    def size(self, name: str) -> int:
        """Bytes of the file, as the Hub says."""
        return self.repository.size(name)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        return self.reader.read(self.repository, name, start, length) if length else b""


def _described(found: Any, repo_id: str) -> Repository:
    try:
        commit, name, siblings = found["sha"], found.get("id", repo_id), found.get("siblings", [])
        sizes = {file["rfilename"]: file.get("size") for file in siblings[:MOST_FILES]}
    except (TypeError, KeyError, AttributeError) as error:
        detail = "the Hub's answer is no description of a repository"
        raise Unavailable(detail, field="model", value=repo_id, hint=MISLED) from error
    sound = isinstance(commit, str) and commit.isalnum() and isinstance(name, str) and re.fullmatch(HUB_ID, name)
    if not sound or not all(_is_size(path, size) for path, size in sizes.items()):
        raise Unavailable("the Hub describes a repository as none can be", field="model", value=repo_id, hint=MISLED)
    return Repository(name, commit, sizes)


def _tree_sizes(found: Any, repo_id: str) -> dict[str, int | None]:
    """Sizes in the list of a repository's files; of a Hub that does not say them in the description."""
    try:
        sizes = {file["path"]: file.get("size") for file in found[:MOST_FILES] if file["type"] == "file"}
    except (TypeError, KeyError, AttributeError) as error:
        detail = "the Hub's answer is no list of files"
        raise Unavailable(detail, field="model", value=repo_id, hint=MISLED) from error
    if not all(_is_size(path, size) for path, size in sizes.items()):
        raise Unavailable("the Hub lists files as none can be", field="model", value=repo_id, hint=MISLED)
    return sizes


def _is_size(path: object, size: object) -> bool:
    return isinstance(path, str) and (size is None or (type(size) is int and size >= 0))
