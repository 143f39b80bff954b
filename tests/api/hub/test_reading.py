"""Finished jobs read by the real client of the Hub: files, revisions, keys, connections that break."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.domain.access import Scope
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright.errors import Conflict
from tests.bitwright.cutting_proxy import CutAnswer, CuttingProxy
from tests.bitwright.service import Service, running_service

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "original/notes.txt": b"kept as it came\n",
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"low rank"}
NATIVE = {"bitwright.json": b"{}"}
BODY = {"model": "org/model", "method": "rtn", "bits": 4}
FOREIGN_TOKEN = "hf_ThisIsTheTokenOfAnotherHub1234567890"
FLUSHED = 10 * 2**20
"""Bytes that the client writes at a time: so much it keeps of a connection that breaks."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def job(service: Service) -> str:
    """A job with a name, whose result is a checkpoint and an adapter for it."""
    body = {**BODY, "name": "acme/tiny-w4", "formats": ["compressed-tensors", "peft"], "adapter": {"kind": "lora"}}
    body["finetune"] = {"dataset": "builtin"}
    return service.finished(body, {"compressed-tensors": FILES, "native": NATIVE, "peft": ADAPTER})


def hub(service: Service) -> str:
    return f"{service.url}/hub"


def client(service: Service, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub(service), token=service.key if token is None else token)


def stranger(service: Service) -> str:
    """A key of another tenant."""
    with service.database.transaction() as session:
        tenant = ensure_tenant(session, "another")
        return issue_key(session, tenant.id, name="other", scopes=frozenset({Scope.SUBMIT}))[1]


def read(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def artifacts(service: Service, job: str, name: str) -> dict[str, bytes]:
    """The files of a checkpoint as the API's own routes send them."""
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}) as http:
        items = http.get(f"/v1/jobs/{job}/artifacts").json()["items"]
        return {
            item["path"]: http.get(f"/v1/artifacts/{item['id']}/content").content
            for item in items
            if item["format"] == name
        }


def test_a_snapshot_has_the_bytes_of_the_artifacts(service: Service, job: str, tmp_path: Path) -> None:
    api = client(service)
    by_name = api.snapshot_download("acme/tiny-w4", cache_dir=tmp_path)
    assert read(by_name) == FILES | {f"peft/{path}": content for path, content in ADAPTER.items()}
    by_id = api.snapshot_download(f"jobs/{job}", cache_dir=tmp_path)
    assert read(by_id) == read(by_name)
    assert Path(by_id).name == Path(by_name).name == api.model_info("acme/tiny-w4").sha
    for branch in ("compressed-tensors", "peft", "native"):
        there = api.snapshot_download(f"jobs/{job}", revision=branch, cache_dir=tmp_path)
        assert read(there) == artifacts(service, job, branch)
    commit = api.model_info(f"jobs/{job}", revision="peft").sha
    assert read(api.snapshot_download(f"jobs/{job}", revision=commit, cache_dir=tmp_path)) == ADAPTER


def test_what_clients_ask_of_a_repository(service: Service, job: str, tmp_path: Path) -> None:
    api = client(service)
    info = api.model_info(f"jobs/{job}", files_metadata=True)
    sizes = {s.rfilename: s.size for s in info.siblings or []}
    assert info.private
    assert info.id == "acme/tiny-w4"
    assert sizes == {p: len(c) for p, c in FILES.items()} | {f"peft/{p}": len(c) for p, c in ADAPTER.items()}
    assert [b.name for b in api.list_repo_refs(f"jobs/{job}").branches] == [
        "main",
        *("compressed-tensors", "native", "peft"),
    ]
    top = {entry.path: type(entry).__name__ for entry in api.list_repo_tree(f"jobs/{job}")}
    assert top["original"] == top["peft"] == "RepoFolder"
    assert top["config.json"] == "RepoFile"
    inside = [entry.path for entry in api.list_repo_tree(f"jobs/{job}", "original")]
    assert inside == ["original/notes.txt"]
    assert api.file_exists(f"jobs/{job}", "config.json")
    assert not api.file_exists(f"jobs/{job}", "nothing.json")
    assert api.whoami()["name"] == "default"
    api.auth_check(f"jobs/{job}")
    local = api.snapshot_download(f"jobs/{job}", cache_dir=tmp_path)
    assert api.verify_repo_checksums(f"jobs/{job}", local_dir=local).mismatches == []


def test_a_long_tree_comes_in_pages(service: Service, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"Authorization": f"Bearer {service.key}"}
    url, paths = f"{hub(service)}/api/models/jobs/{job}/tree/main?recursive=true&limit=2", []
    while url:
        answer = httpx.get(url, headers=key)
        paths += [entry["path"] for entry in answer.json()]
        assert len(answer.json()) <= 2
        url = answer.links.get("next", {}).get("url", "")
    whole = httpx.get(f"{hub(service)}/api/models/jobs/{job}/tree/main?recursive=true", headers=key).json()
    assert paths == [entry["path"] for entry in whole]
    assert len(paths) == len(FILES) + len(ADAPTER) + 2


def test_what_is_not_there_is_told_as_a_hub_tells_it(service: Service, job: str, tmp_path: Path) -> None:
    api, repository = client(service), f"jobs/{job}"
    waiting = service.client()
    with waiting:
        queued = waiting.submit(BODY).id
    for missing in ("jobs/nothing", "acme/nothing", "jobs/job_0123456789abcdefghjkmnpqrs", f"jobs/{queued}", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(missing)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(missing, "config.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download(repository, revision="v2", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repository, revision="refs/pr/1")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(repository, "config.json", revision="0" * 40, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repository, "nothing.json", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repository, "nowhere"))
    with service.client() as own:
        own.cancel(queued)


def test_another_tenants_job_and_name_do_not_exist(service: Service, job: str, tmp_path: Path) -> None:
    other = client(service, stranger(service))
    for repository in (f"jobs/{job}", "acme/tiny-w4"):
        with pytest.raises(RepositoryNotFoundError):
            other.model_info(repository)
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download(repository, "config.json", cache_dir=tmp_path)


def test_no_key_is_no_repository_and_another_hubs_token_is_refused_and_kept_nowhere(
    service: Service, job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RepositoryNotFoundError):
        client(service, False).snapshot_download(f"jobs/{job}", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError) as refused:
        client(service, FOREIGN_TOKEN).model_info(f"jobs/{job}")
    assert refused.value.response.status_code == 401
    assert not isinstance(refused.value, RepositoryNotFoundError)
    assert "Invalid credentials" in str(refused.value)
    written = capfd.readouterr()
    assert "request_served" in written.out + written.err, "there are logs to look at"
    assert FOREIGN_TOKEN not in written.out + written.err
    assert not [p for p in service.folder.rglob("*") if p.is_file() and FOREIGN_TOKEN.encode() in p.read_bytes()]


def test_a_broken_connection_goes_on_where_it_broke(service: Service, tmp_path: Path) -> None:
    content = bytes(range(251)) * (25 * 2**20 // 251)
    job = service.finished(BODY, {"compressed-tensors": {"model.safetensors": content}})
    with CuttingProxy(service.address, [CutAnswer(FLUSHED + 4 * 2**20)]) as proxy:
        path = hf_hub_download(
            f"jobs/{job}", "model.safetensors", endpoint=f"{proxy.url}/hub", token=service.key, cache_dir=tmp_path
        )
        heard = b"".join(proxy.heard).lower()
    assert Path(path).read_bytes() == content
    assert f"range: bytes={FLUSHED}-".encode() in heard, "the second connection asks for the rest alone"


def test_a_name_is_of_one_job_until_it_is_deleted(service: Service) -> None:
    with service.client() as own:
        first = own.submit({**BODY, "name": "nightly"})
        with pytest.raises(Conflict) as taken:
            own.submit({**BODY, "name": "nightly"})
        assert first.id in str(taken.value)
        assert taken.value.field == "name"
        own.cancel(first.id)
        own.delete(first.id)
        second = own.submit({**BODY, "name": "nightly"})
        assert json.loads(second.model_dump_json())["request"]["name"] == "nightly"
        own.cancel(second.id)


def test_files_of_a_commit_never_change_and_those_of_a_branch_are_asked_for_again(service: Service, job: str) -> None:
    key = {"Authorization": f"Bearer {service.key}"}
    at_main = httpx.head(f"{hub(service)}/jobs/{job}/resolve/main/config.json", headers=key)
    commit = at_main.headers["x-repo-commit"]
    at_commit = httpx.head(f"{hub(service)}/jobs/{job}/resolve/{commit}/config.json", headers=key)
    assert at_main.headers["cache-control"] == "private, no-cache"
    assert "immutable" in at_commit.headers["cache-control"]
    assert at_main.headers["etag"] == at_commit.headers["x-linked-etag"]
    assert int(at_main.headers["x-linked-size"]) == len(FILES["config.json"])
    same = {**key, "If-None-Match": at_main.headers["etag"]}
    assert httpx.get(f"{hub(service)}/jobs/{job}/resolve/main/config.json", headers=same).status_code == 304


def test_snapshots_of_a_part(service: Service, job: str, tmp_path: Path) -> None:
    part = snapshot_download(
        f"jobs/{job}", allow_patterns="*.json", endpoint=hub(service), token=service.key, local_dir=tmp_path / "part"
    )
    assert {path for path in read(part) if not path.startswith(".cache")} == {"config.json", "peft/adapter_config.json"}


def test_parameters_that_a_later_client_sends_are_passed_over(service: Service, job: str) -> None:
    key = {"Authorization": f"Bearer {service.key}"}
    url = f"{hub(service)}/api/models/jobs/{job}?expand=siblings&expand=sha&from_the_future=1"
    assert httpx.get(url, headers=key).json()["id"] == "acme/tiny-w4"
