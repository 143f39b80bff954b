"""A download never mixes with what a folder holds: it refuses, resumes its own, or empties what may be emptied."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from bitwright.errors import Conflict, StorageError, Unavailable
from bitwright.files.downloads import partial_path, subfolder
from bitwright.files.folders import empty_folder
from tests.bitwright.cutting_proxy import CutAnswer, CuttingProxy
from tests.bitwright.service import Service

PLAIN = {"model": "org/name", "method": "rtn", "bits": 4}
TRAINED = {"model": "org/name", "method": "qlora", "bits": 4, "finetune": {"dataset": "org/text"}}
WEIGHTS = random.Random(1).randbytes(2_000_000)
ONE = {"config.json": b'{"one": 1}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
OTHER = {"config.json": b'{"two": 2}', "model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json": b"{}"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"factors"}


@pytest.fixture(scope="module")
def job(service: Service) -> str:
    return service.finished(
        PLAIN, {"compressed-tensors": ONE, "native": {"bitwright.json": b"{}", "w.safetensors": b"n"}}
    )


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


@pytest.mark.parametrize(
    "there",
    [
        OTHER,
        {"model.safetensors.index.json": b"{}"},
        {"config.json": b'{"edited": true}'},
        {"model.safetensors": WEIGHTS[:1000]},
        {"model.safetensors.0123456789ab.partial": b"of another job"},
        {"deep/down/note.txt": b"mine"},
        {".hidden": b""},
    ],
    ids=lambda there: next(iter(there)),
)
def test_a_folder_that_holds_something_else_is_refused(
    service: Service, job: str, tmp_path: Path, there: dict[str, bytes]
) -> None:
    fill(tmp_path, there)
    with service.client() as client, pytest.raises(Conflict, match="not of this download") as caught:
        client.download(job, tmp_path)
    assert held(tmp_path) == there, "nothing was touched"
    assert next(iter(sorted(there))) in caught.value.detail
    assert (caught.value.field, caught.value.value) == ("folder", str(tmp_path))
    assert caught.value.hint is not None
    assert "--force" in caught.value.hint


def test_another_format_of_the_same_job_is_something_else_too(service: Service, job: str, tmp_path: Path) -> None:
    with service.client() as client:
        client.download(job, tmp_path)
        with pytest.raises(Conflict):
            client.download(job, tmp_path, format="native")
        client.download(job, tmp_path, format="native", force=True)
    assert set(held(tmp_path)) == {"bitwright.json", "w.safetensors"}


def test_a_link_to_the_right_bytes_is_no_file_of_its_own(service: Service, job: str, tmp_path: Path) -> None:
    fill(tmp_path, {"elsewhere": WEIGHTS})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with service.client() as client, pytest.raises(Conflict):
        client.download(job, folder)


def test_an_interrupted_download_goes_on(service: Service, job: str, tmp_path: Path) -> None:
    # config.json arrives, the weights break, and every try after that.
    plan = [CutAnswer(100_000)] + [CutAnswer(0)] * 40
    with service.client() as client:
        artifacts = client.parts(job, tmp_path)[tmp_path]
        by_path = {artifact.path: artifact for artifact in artifacts}
        client.download_artifact(by_path["config.json"], tmp_path)
        gone = CuttingProxy(service.address, plan)
        with gone, service.client(gone.url) as broken, pytest.raises(Unavailable):
            broken.download_artifact(by_path["model.safetensors"], tmp_path)
        half = partial_path(tmp_path / "model.safetensors", by_path["model.safetensors"].sha256)
        assert 0 < half.stat().st_size < len(WEIGHTS)
        received: list[int] = []
        with CuttingProxy(service.address) as proxy, service.client(proxy.url) as again:
            files = again.download(job, tmp_path, on_bytes=received.append)
        asked = b"".join(proxy.heard).lower()
        assert b"range: bytes=" in asked, "the half file is taken up"
        assert by_path["config.json"].id.encode() not in asked, "the whole file is not fetched again"
    assert held(tmp_path) == ONE
    assert sorted(files) == sorted(tmp_path / name for name in ONE)
    assert sum(received) == sum(map(len, ONE.values()))


def test_a_finished_download_may_be_repeated(service: Service, job: str, tmp_path: Path) -> None:
    with service.client() as client:
        first = client.download(job, tmp_path)
        assert client.download(job, tmp_path) == first
    assert held(tmp_path) == ONE


def test_force_empties_a_checkpoint(service: Service, job: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    fill(outside, {"precious.safetensors": b"precious"})
    fill(folder, OTHER | {"sub/more.safetensors": b"x", "sub/deeper/file": b"y"})
    (folder / "link.safetensors").symlink_to(outside / "precious.safetensors")
    (folder / "folder-link").symlink_to(outside)
    with service.client() as client:
        client.download(job, folder, force=True)
    assert held(folder) == ONE
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert held(outside) == {"precious.safetensors": b"precious"}


def checkout(folder: Path) -> None:
    fill(folder, {".git/HEAD": b"ref: refs/heads/main", "model.safetensors": b"x"})


def deep_checkout(folder: Path) -> None:
    fill(folder, {"model.safetensors": b"x", "a/b/.git": b"gitdir: elsewhere"})


def sources(folder: Path) -> None:
    fill(folder, {"config.json": b"{}", "main.py": b"print()"})


def service_data(folder: Path) -> None:
    fill(folder, {"bitwright.db": b"", "x.safetensors": b""})


def pipe(folder: Path) -> None:
    fill(folder, {"x.safetensors": b""})
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize("fill_with", [checkout, deep_checkout, sources, service_data, pipe])
def test_force_refuses_what_is_no_checkpoint(service: Service, job: str, tmp_path: Path, fill_with: object) -> None:
    assert callable(fill_with)
    fill_with(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with service.client() as client, pytest.raises(Conflict, match="is not emptied"):
        client.download(job, tmp_path, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_refuses_home_root_the_present_folder_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "work" / "here"
    for folder in (home, here):
        fill(folder, {"model.safetensors": b"x"})
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(here)
    # The folder above is asked for last: were it emptied, nothing would be left to see.
    for folder in (home, home / ".." / "home", here, Path("."), here.parent, tmp_path / "link", tmp_path, Path("/")):
        with pytest.raises(Conflict, match="is not emptied"):
            empty_folder(folder)
    assert held(home) == held(here) == {"model.safetensors": b"x"}


def test_force_refuses_what_git_tracks_and_takes_what_it_does_not(tmp_path: Path) -> None:
    kept, made = tmp_path / "fixtures", tmp_path / "made"
    for folder in (kept, made):
        fill(folder, {"model.safetensors": b"x"})
    for words in (["init", "-q"], ["add", "fixtures"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    with pytest.raises(Conflict, match=r"git tracks .*model\.safetensors"):
        empty_folder(kept)
    empty_folder(made)
    assert list(made.iterdir()) == []
    assert held(kept) == {"model.safetensors": b"x"}


def test_a_file_is_no_folder(service: Service, job: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with service.client() as client, pytest.raises(Conflict, match="is a file"):
        client.download(job, tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finetuned_job_brings_base_and_adapter(service: Service, tmp_path: Path) -> None:
    made = {"merged": ONE, "peft": ADAPTER, "native": {"w.safetensors": b"n"}, "adapter": {"adapter.safetensors": b"a"}}
    job = service.finished(TRAINED, made)
    with service.client() as client:
        client.download(job, tmp_path / "both")
        client.download(job, tmp_path / "both")
        client.download(job, tmp_path / "one", format="merged")
        assert held(tmp_path / "one") == ONE
        with pytest.raises(Conflict):
            client.download(job, tmp_path / "one")
        with pytest.raises(Conflict):
            client.download(job, tmp_path / "both", format="merged")
    assert held(tmp_path / "both" / "merged") == ONE
    assert held(tmp_path / "both" / "peft") == ADAPTER
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"merged", "peft"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "a\0b"])
def test_the_name_of_a_format_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="leaves its folder"):
        subfolder(tmp_path, name)
