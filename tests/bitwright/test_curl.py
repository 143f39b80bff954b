"""The documentation's curl commands with the real one: names from the service, downloads that go on after a cut."""

import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.bitwright.cutting_proxy import CutAnswer, CuttingProxy
from tests.bitwright.service import Service
from tests.documents.curl import curl_folder

WEIGHTS = random.Random(2).randbytes(3_000_000)
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "sub/ü ü.txt": b"text"}
REQUEST = {"model": "org/name", "method": "rtn", "bits": 4}


@pytest.fixture(scope="module")
def job(service: Service) -> str:
    return service.finished(REQUEST, {"compressed-tensors": FILES})


def content(service: Service, job: str, path: str) -> str:
    with service.client() as client:
        artifact = next(a for a in client.artifacts(job) if a.path == path)
    return f"/v1/artifacts/{artifact.id}/content"


def curl(service: Service, folder: Path, *arguments: str, stand_in: bool = False) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([*curl_folder(folder.parent, always=stand_in), os.environ["PATH"]])
    command = ["curl", *arguments, "-H", f"Authorization: Bearer {service.key}"]
    environment = {**os.environ, "PATH": path, "CURL_HOME": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, env=environment, check=False, timeout=60)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("stand_in", [False, True], ids=["curl", "stand-in"])
def test_a_download_that_was_cut_goes_on_and_may_be_given_again(
    service: Service, job: str, here: Path, stand_in: bool
) -> None:
    url = content(service, job, "model.safetensors")
    resume = ("-f", "-C", "-", "-o", "model.safetensors")
    with CuttingProxy(service.address, [CutAnswer(1_000_000)]) as proxy:
        cut = curl(service, here, *resume, proxy.url + url, stand_in=stand_in)
        assert cut.returncode != 0
        there = (here / "model.safetensors").stat().st_size
        assert 0 < there < len(WEIGHTS)
        done = curl(service, here, *resume, proxy.url + url, stand_in=stand_in)
        assert done.returncode == 0, done.stderr
        asked = proxy.heard[1].lower()
    assert f"range: bytes={there}-".encode() in asked
    assert (here / "model.safetensors").read_bytes() == WEIGHTS
    for _ in range(2):
        whole = curl(service, here, *resume, f"http://127.0.0.1:{service.port}{url}", stand_in=stand_in)
        assert (here / "model.safetensors").read_bytes() == WEIGHTS, "all of it is there, and nothing is added"
        assert whole.returncode in (0, 22), whole.stderr


@pytest.mark.parametrize("stand_in", [False, True], ids=["curl", "stand-in"])
def test_a_refusal_is_not_written_into_the_file(service: Service, job: str, here: Path, stand_in: bool) -> None:
    (here / "model.safetensors").write_bytes(WEIGHTS[:1000])
    url = f"http://127.0.0.1:{service.port}/v1/artifacts/art_{'0' * 26}/content"
    refused = curl(service, here, "-f", "-C", "-", "-o", "model.safetensors", url, stand_in=stand_in)
    assert refused.returncode == 22
    assert (here / "model.safetensors").read_bytes() == WEIGHTS[:1000]


def test_an_archive_unpacks_to_the_folder_that_was_named(service: Service, job: str, here: Path) -> None:
    url = f"http://127.0.0.1:{service.port}/v1/jobs/{job}/archive?folder=smollm2-w4"
    assert curl(service, here, "-f", "-o", "whole.tar", url).returncode == 0
    with tarfile.open(here / "whole.tar") as archive:
        archive.extractall(here, filter="data")
    held = {p.relative_to(here).as_posix(): p.read_bytes() for p in (here / "smollm2-w4").rglob("*") if p.is_file()}
    assert held == {f"smollm2-w4/{name}": content for name, content in FILES.items()}


@pytest.mark.skipif(shutil.which("curl") is None, reason="the option is the real curl's alone")
def test_the_name_that_the_service_gives_is_taken(service: Service, job: str, here: Path) -> None:
    base = f"http://127.0.0.1:{service.port}"
    for path, name in (("config.json", "config.json"), ("model.safetensors", "model.safetensors")):
        assert curl(service, here, "-f", "-O", "-J", base + content(service, job, path)).returncode == 0
        assert (here / name).read_bytes() == FILES[path]
    assert curl(service, here, "-f", "-O", "-J", f"{base}/v1/jobs/{job}/archive").returncode == 0
    assert (here / f"{job}-compressed-tensors.tar").exists()
    both = curl(service, here, "-C", "-", "-O", "-J", base + content(service, job, "config.json"))
    assert both.returncode != 0, "which is why the documents name the file themselves"
