"""`deploy/nginx.conf` in a real nginx before a real API: TLS, streams, and downloads that nginx sends by itself."""

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.domain.access import Scope
from app.store.attempts import AttemptWriter, NewArtifact, claim
from app.store.blobs import open_blobs
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright.job_states import DeviceClass
from tests import servers
from tests.documentation import ROOT
from tests.reports import report
from tests.store.samples import add

CONTENT = os.urandom(3 << 20)
NGINX = os.environ.get("BITWRIGHT_TEST_NGINX") or shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]


@dataclass(frozen=True)
class Proxied:
    """A client of the service through nginx, one that asks it without, and the id of an artifact of `CONTENT`."""

    client: httpx.Client
    direct: httpx.Client
    artifact: str
    job: str


def certificate(folder: Path) -> ssl.SSLContext:
    """Make the two files that the configuration names; a context that trusts them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bitwright.example")])
    at = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    kind = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "privkey.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *kind))
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return ssl.create_default_context(cafile=str(folder / "fullchain.pem"))


def configuration(folder: Path, blobs: Path, *, api: int, plain: int, tls: int) -> Path:
    """The example with this test's places and ports, in a server that runs as this user in the foreground."""
    text = (ROOT / "deploy/nginx.conf").read_text(encoding="utf-8")
    changes = {
        "/etc/nginx/tls": str(folder),
        "127.0.0.1:8080": f"127.0.0.1:{api}",
        "/var/lib/bitwright/blobs": str(blobs),
        "listen 80;": f"listen 127.0.0.1:{plain};",
        "listen 443 ssl": f"listen 127.0.0.1:{tls} ssl",
        "server_name bitwright.example;": "server_name localhost;",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    main = f"daemon off;\nerror_log stderr;\npid {folder}/pid;\nevents {{}}\n"
    main = f"user root;\n{main}" if os.geteuid() == 0 else main
    whole = folder / "whole.conf"
    whole.write_text(f"{main}http {{\naccess_log off;\n{places}{text}}}\n")
    return whole


def finished_job(url: str, blobs: Path, content: Path) -> tuple[str, str]:
    """A job with one file; its id and a key of its tenant."""
    database = Database(url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "t").id
        _, key = issue_key(session, tenant, name="k", scopes=frozenset({Scope.SUBMIT}))
    job = add(database, tenant)
    blob = open_blobs(f"file://{blobs}").put(content)
    media_type = "application/octet-stream"
    file = NewArtifact("native", "model.safetensors", blob.sha256, blob.size, media_type)
    with database.transaction() as session:
        held = claim(session, worker_id="w", device_class=DeviceClass.CPU, lease_seconds=60)
        assert held is not None
        AttemptWriter(session, held.job_id, held.attempt).succeed(report(), [file])
    database.close()
    return job, key


@pytest.fixture
def proxied(sqlite_url: str, tmp_path: Path) -> Iterator[Proxied]:
    blobs, content = tmp_path / "blobs", tmp_path / "content"
    content.write_bytes(CONTENT)
    job, key = finished_job(sqlite_url, blobs, content)
    api, plain, tls = (servers.free_port() for _ in range(3))
    trusted = certificate(tmp_path)
    whole = configuration(tmp_path, blobs, api=api, plain=plain, tls=tls)
    values = {
        "DATABASE_URL": sqlite_url,
        "DATA_DIR": str(tmp_path),
        "BLOB_URL": f"file://{blobs}",
        "PORT": str(api),
        "ACCELERATED_PATH": "/_bitwright_blobs",
    }
    environment = {**os.environ, **{f"BITWRIGHT_{name}": value for name, value in values.items()}}
    assert NGINX is not None
    checked = subprocess.run([NGINX, "-t", "-c", str(whole)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    processes = [
        subprocess.Popen([sys.executable, "-m", "bitwright.cli", "api"], env=environment),
        subprocess.Popen([NGINX, "-c", str(whole)]),
    ]
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with (
            httpx.Client(base_url=f"https://localhost:{tls}", headers=headers, verify=trusted, timeout=30) as client,
            httpx.Client(base_url=f"http://127.0.0.1:{api}", headers=headers, timeout=30) as direct,
        ):
            await_answer(client)
            (artifact,) = client.get(f"/v1/jobs/{job}/artifacts").json()["items"]
            yield Proxied(client, direct, artifact["id"], job)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)


def await_answer(client: httpx.Client) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the service does not answer through nginx")


def test_the_proxy_sends_files_with_all_that_the_service_says_of_them(proxied: Proxied) -> None:
    url = f"/v1/artifacts/{proxied.artifact}/content"
    ours = proxied.direct.get(url)
    assert ours.headers["X-Accel-Redirect"].startswith("/_bitwright_blobs/")
    assert ours.content == b""  # the proxy is to send the file
    whole = proxied.client.get(url)
    assert hashlib.sha256(whole.content).digest() == hashlib.sha256(CONTENT).digest()
    assert "X-Accel-Redirect" not in whole.headers
    told = ("ETag", "Repr-Digest", "Cache-Control", "Content-Disposition", "Content-Type", "X-Content-Type-Options")
    assert {name: whole.headers[name] for name in told} == {name: ours.headers[name] for name in told}
    part = proxied.client.get(url, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, CONTENT[1000:2000])
    assert part.headers["Content-Range"] == f"bytes 1000-1999/{len(CONTENT)}"
    rest = {"Range": "bytes=3000000-", "If-Range": whole.headers["ETag"]}
    resumed = proxied.client.get(url, headers=rest)  # as the client goes on with a download that broke
    assert (resumed.status_code, resumed.content) == (206, CONTENT[3_000_000:])
    assert proxied.client.get(url, headers={"If-None-Match": whole.headers["ETag"]}).status_code == 304
    assert proxied.client.head(url).headers["Content-Length"] == str(len(CONTENT))


def test_nobody_gets_a_file_by_its_place(proxied: Proxied) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    url = f"/v1/artifacts/{proxied.artifact}/content"
    assert proxied.client.get(f"/_bitwright_blobs/{sha256[:2]}/{sha256}").status_code == 404
    assert proxied.client.get(url, headers={"Authorization": ""}).status_code == 401
    assert proxied.client.get("/metrics").status_code == 403


def test_streams_come_through_as_they_are_written(proxied: Proxied) -> None:
    url = f"/v1/jobs/{proxied.job}/events"
    with proxied.client.stream("GET", url, headers={"Accept": "text/event-stream"}) as stream:
        text = "".join(stream.iter_text())
    assert re.findall(r'"status":"(\w+)"', text) == ["queued", "running", "succeeded"]
