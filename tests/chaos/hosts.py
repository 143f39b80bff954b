"""The service under chaos on three hosts: API and sweep on one, a worker on each of two, with disks of their own.

They are network namespaces of this machine and share a database, a broker and a bucket alone, which are on the machine
that the cables lead to. A cable can be pulled, and a worker's host lost with its disk.
"""

import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tests import servers
from tests.chaos.plan import KINDS, LEASE_SECONDS, LINKED, PAST_THE_LEASE, TENANTS, WORKERS, Fault, Kind
from tests.chaos.service import Service, Story, begin, end_service, link_of
from tests.e2e.installation import Installation, Process, children
from tests.hosts.cluster import BUCKET_PORT, KEYS, S3
from tests.hosts.namespaces import Host, network
from tests.supervise.bench import wait_for

KEEP_SECONDS = 1.0
"""So often a worker keeps what a job has finished: what a lost host costs at the most."""
HOSTS: Mapping[str, tuple[str, ...]] = {"front": ("api", "sweep"), "back0": WORKERS[:1], "back1": WORKERS[1:]}
"""Parts by host."""
EACH_WORKER = tuple((name,) for name in WORKERS)
HOST_KINDS: Mapping[str, Kind] = {
    **KINDS,
    "cable_pulled": Kind(tuple(HOSTS.values()), PAST_THE_LEASE, "a host hears nothing, for longer than a lease"),
    "host_lost": Kind(EACH_WORKER, 5.0, "a worker's host is gone with its disk, and one with an empty one comes"),
}
"""Faults by name, with those of hosts besides."""


@contextmanager
def serving_on_hosts(folder: Path, model: Path) -> Iterator[Service]:
    """A running service with its tenants, who have sent the model; its files, logs and story are in `folder`."""
    with network(*HOSTS) as hosts, servers.postgres_cluster(synchronous_commit="on") as cluster:
        here = next(iter(hosts.values())).address.rpartition(".")[0] + ".1"
        logs, by_part = folder / "logs", {part: hosts[name] for name, parts in HOSTS.items() for part in parts}
        postgres = Process("postgres", cluster.command, dict(os.environ), logs / "postgres.log", user=cluster.user)
        shared = {
            **{"LEASE_SECONDS": str(LEASE_SECONDS), "KEEP_STATE_SECONDS": str(KEEP_SECONDS), "MODEL_ROOTS": ""},
            "BLOB_URL": "s3://blobs/bitwright",
        }
        installation = Installation(folder, model, servers.text(cluster.url), settings=shared)
        installation.variables["BITWRIGHT_BROKER_URL"] = f"redis://{here}:{installation.broker_port}/0"
        links = {name: link_of(cluster, here) for (name,) in LINKED}
        clocks = {name: folder / f"{name}.clock" for name in WORKERS}
        service = Service(installation, postgres, cluster, links, clocks, Story(folder / "story.jsonl"))
        service = replace(service, hosts=by_part, kept_every=KEEP_SECONDS, api=f"http://{by_part['api'].address}:8080")
        with _bucket(here, logs):
            try:
                begin(service, here, lambda: _place(service))
                for name in TENANTS:
                    sent = service.clients[name].upload([model])
                    service.models[name] = {"source": "upload", "id": sent.id}
                yield service
            finally:
                for host in hosts.values():
                    with suppress(Exception):
                        host.mend()
                end_service(service)


@contextmanager
def _bucket(here: str, logs: Path) -> Iterator[None]:
    """A server that speaks S3, which this process finds by its environment as the service does."""
    address = f"http://{here}:{BUCKET_PORT}"
    process = Process(
        "bucket", [os.environ[S3], "-H", here, "-p", str(BUCKET_PORT)], dict(os.environ), logs / "bucket.log"
    )
    before = dict(os.environ)
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
    process.start()
    try:
        request = urllib.request.Request(f"{address}/blobs", method="PUT")
        wait_for(lambda: _done(request), 120, what="the bucket")
        yield
    finally:
        process.send(signal.SIGTERM)
        assert process.process is not None
        process.process.wait(30)
        for name in (*KEYS, "AWS_ENDPOINT_URL"):
            os.environ.pop(name)
            os.environ |= {name: before[name]} if name in before else {}


def _done(request: urllib.request.Request) -> bool:
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        return False
    return True


def _place(service: Service) -> None:
    """Put every part on its host, with a disk and the addresses of what is shared."""
    installation = service.installation
    valkey = installation["valkey"]
    valkey.command = [*valkey.command, "--bind", "0.0.0.0", "--protected-mode", "no"]
    installation["api"].command = [sys.executable, "-m", "bitwright.cli", "api", "--host", "0.0.0.0", "--port", "8080"]
    keys = {name: os.environ[name] for name in (*KEYS, "AWS_ENDPOINT_URL")}
    for part, host in service.hosts.items():
        process = installation[part]
        process.command = host.command(process.command)
        own = {"BITWRIGHT_DATA_DIR": str(disk(service, part)), "BITWRIGHT_PAGE_HOSTS": "*"}
        process.environment = {**process.environment, **keys, **own}


def disk(service: Service, part: str) -> Path:
    """The folder of a part's own host."""
    return service.installation.folder / "disks" / part


def cable_pulled(service: Service, fault: Fault) -> str:
    """Nothing gets through to a host and from it, and no connection hears of its end."""
    host: Host = service.hosts[fault.parts[0]]
    host.cut()
    time.sleep(PAST_THE_LEASE)
    host.mend()
    return "plugged in again"


def host_lost(service: Service, fault: Fault) -> str:
    """The host's processes and disk are gone at once, and nobody hears a farewell."""
    part = fault.parts[0]
    process, host = service.part(part), service.hosts[part]
    host.cut()
    for pid in [process.pid, *children(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.process is not None
    process.process.wait()
    lost = disk(service, part)
    if lost.exists():
        lost.rename(lost.with_name(f"{part}.lost-{fault.number}"))
    time.sleep(2)
    host.mend()
    service.installation.start(part)
    return "replaced"
