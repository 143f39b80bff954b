"""Looks at a repository: what comes back, what is read of it, and each way in which the Hub does not give it."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.hub.answers import refusal_of, renamed
from app.hub.environment import child_variables
from app.hub.repository import Allowance, HubFiles, HubReader
from bitwright.errors import BitwrightError
from tests.child.hub_server import COMMIT, Hole, Hub, running_hub

FILES: dict[str, Any] = {"config.json": b'{"a": 1}', "model.safetensors": Hole(1 << 40, b"0123456789"), "deep/x": b""}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories["models/org/model"] = FILES
        yield hub


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


def reader(client: httpx.Client, hub: Hub, seconds: float = 20, size: int = 1 << 20, **fields: Any) -> HubReader:
    return HubReader(client, Allowance(seconds, size), hub.url, **fields)


def refused(action: Any) -> BitwrightError:
    with pytest.raises(BitwrightError) as error:
        action()
    return error.value


def test_a_repository_is_its_commit_and_its_files_sizes(hub: Hub, client: httpx.Client) -> None:
    found = reader(client, hub).repository("org/model", "main")
    assert (found.id, found.commit) == ("org/model", COMMIT)
    assert found.sizes == {"config.json": 8, "model.safetensors": 1 << 40, "deep/x": 0}
    files = HubFiles(reader(client, hub), found)
    assert list(files.names()) == ["config.json", "model.safetensors"]
    assert files.read("config.json", 0, 8) == b'{"a": 1}'
    assert files.read("model.safetensors", 3, 4) == b"3456"
    assert files.read("model.safetensors", 3, 0) == b""


def test_sizes_that_are_not_in_the_description_are_in_the_list_of_files(hub: Hub, client: httpx.Client) -> None:
    hub.says_sizes = False
    found = reader(client, hub).repository("org/model", "main")
    assert found.sizes == {"config.json": 8, "model.safetensors": 1 << 40, "deep/x": 0}
    assert [path.split("/")[4] for _, path in hub.requests] == ["revision", "tree"]


def test_a_server_without_ranges_is_read_no_further_than_asked(hub: Hub, client: httpx.Client) -> None:
    def whole(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for _ in range(1000):
                yield bytes(range(100))
            raise AssertionError("it was read to its end")

    found = reader(client, hub).repository("org/model", "main")
    with httpx.Client(transport=httpx.MockTransport(whole)) as other:
        assert reader(other, hub).read(found, "config.json", 98, 4) == bytes([98, 99, 0, 1])


def test_each_way_in_which_the_hub_gives_nothing_has_its_code_and_message(hub: Hub, client: httpx.Client) -> None:
    hub.repositories["models/org/gated"] = FILES
    hub.gated.add("models/org/gated")

    def ask(name: str, revision: str = "main") -> BitwrightError:
        return refused(lambda: reader(client, hub).repository(name, revision))

    gated, missing, gone = ask("org/gated"), ask("org/none"), ask("org/model", "gone")
    hub.retry_after = "37"
    limited = ask("org/model")
    hub.retry_after, hub.broken = None, True
    away = ask("org/model")
    errors = (gated, missing, gone, limited, away)
    assert [error.code for error in errors] == [
        *("source_gated", "source_not_found", "source_not_found", "hub_rate_limited", "unavailable"),
    ]
    assert len({error.detail for error in errors}) == len({error.hint for error in errors[:4]}) + 1 == 5
    assert "37 seconds" in limited.detail
    assert "org/gated is gated" in gated.detail


@pytest.mark.parametrize("given", ["", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", "999999", "-1", "²"])
def test_a_wait_that_is_no_number_of_seconds_is_not_repeated(given: str) -> None:
    error = refusal_of(429, {"Retry-After": given}, "model", "org/model")
    assert (error.code, error.detail) == ("hub_rate_limited", "the Hub has had too many requests of this address")


def test_a_name_with_other_capitals_is_the_same() -> None:
    assert renamed("Org/Model", "org/model") is None
    assert "org/new" in str(renamed("org/model", "org/new"))


def test_the_token_does_not_go_where_the_hub_keeps_large_files(hub: Hub, client: httpx.Client) -> None:
    with running_hub() as store:
        store.repositories = hub.repositories
        hub.store = store.url
        asking = reader(client, hub, token="hf_secret", elsewhere=True)
        found = asking.repository("org/model", "main")
        assert asking.read(found, "model.safetensors", 0, 4) == b"0123"
        assert (hub.tokens, store.tokens) == ({"Bearer hf_secret"}, {""})
        error = refused(lambda: reader(client, hub).read(found, "model.safetensors", 0, 4))
        assert (error.code, "another host" in error.detail) == ("unavailable", True)
        assert store.tokens == {""}


def test_a_circle_of_redirects_ends(hub: Hub, client: httpx.Client) -> None:
    hub.store = hub.url
    found = reader(client, hub).repository("org/model", "main")
    assert "circle" in refused(lambda: reader(client, hub).read(found, "model.safetensors", 0, 4)).detail


def test_no_more_bytes_are_read_than_allowed(hub: Hub, client: httpx.Client) -> None:
    hub.repositories["models/org/model"] = {"config.json": b" " * 5000}
    found = reader(client, hub).repository("org/model", "main")
    error = refused(lambda: reader(client, hub, size=4999).read(found, "config.json", 0, 5000))
    assert error.code == "unsupported_checkpoint"
    assert reader(client, hub, size=5000).read(found, "config.json", 0, 5000) == b" " * 5000


def test_a_hub_that_takes_too_long_is_given_up(hub: Hub, client: httpx.Client) -> None:
    hub.answering.clear()
    started = time.monotonic()
    error = refused(lambda: reader(client, hub, seconds=0.3).repository("org/model", "main"))
    assert error.code == "unavailable"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b'{"id": "org/model"}',
        b'{"sha": 7}',
        b'{"sha": "../x"}',
        b'{"sha": "abc", "id": "../../etc"}',
        b'{"sha": "abc", "siblings": [{"rfilename": 3}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "x", "size": -1}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "x", "size": "9"}]}',
        b'{"sha": "abc", "siblings": [{"rfilename": "x"}]}',
        b'{"sha": "abc", "siblings": {"rfilename": "x"}}',
        json.dumps({"sha": "abc", "siblings": [[]]}).encode(),
    ],
)
def test_an_answer_that_describes_no_repository_is_refused(hub: Hub, body: bytes) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=httpx.ByteStream(body)))
    with httpx.Client(transport=transport) as client:
        assert refused(lambda: reader(client, hub).repository("org/model", "main")).code == "unavailable"


def test_threads_share_an_allowance() -> None:
    allowance, refusals = Allowance(60, 1000), []

    def spend() -> None:
        for _ in range(10):
            try:
                allowance.take(60)
            except BitwrightError as error:
                refusals.append(error)

    threads = [threading.Thread(target=spend) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refusals), allowance.bytes_left) == (4, 1000 - 1200)


def test_a_child_that_asks_the_hub_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITWRIGHT_DATABASE_URL", "BITWRIGHT_BROKER_URL", "BITWRIGHT_HUB_TOKEN", "HF_TOKEN", "PGPASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    given = child_variables()
    assert "secret" not in given.values()
    assert given["https_proxy"] == "http://proxy:3128"
