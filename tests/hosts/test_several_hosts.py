"""Two APIs and three workers on hosts of their own, which share a database, a broker and a bucket.

`make test-hosts` runs them: they need root, `ip`, and a server that speaks S3.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from bitwright.job_states import JobStatus
from tests.deployment.source_copy import copy_source
from tests.e2e.conftest import train
from tests.e2e.installation import Installation
from tests.e2e.real_job import TEXT, blocks_computed, wait_until_quantizing
from tests.hosts.cluster import API_PORT, APIS, S3, WORKERS, Hosts, cluster
from tests.hosts.namespaces import missing
from tests.supervise.bench import wait_for

BLOCKS = 8
INTERVAL = 1.0
MIGRATION = '''"""Room for what the next release keeps of a job."""

import sqlalchemy as sa
from alembic import op

revision = "{next}"
down_revision = "{last}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("of_the_next_release", sa.String(length=20), nullable=True))
    op.create_table("table_of_the_next_release", sa.Column("id", sa.String(length=30), primary_key=True))


def downgrade() -> None:
    op.drop_table("table_of_the_next_release")
    op.drop_column("job", "of_the_next_release")
'''

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = missing() or (
        None if os.environ.get(S3) else f"{S3} names no server that speaks S3; see `make test-hosts`"
    )
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    with cluster(folder / "installation", folder / "none", KEEP_STATE_SECONDS=str(INTERVAL)) as made:
        yield made


@pytest.fixture(scope="module")
def upload(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of a model that was sent to one of the APIs: no host has its folder."""
    model = train(tmp_path_factory.mktemp("model"), blocks=BLOCKS)
    sent = hosts.clients["api0"].upload([model])
    shutil.rmtree(model)
    return sent.id


def submit(hosts: Hosts, api: str, upload: str, steps: int = 200) -> str:
    body = {"model": {"source": "upload", "id": upload}, "method": "signround", "bits": 4, "group_size": 32}
    evaluation = {**TEXT, "num_samples": 2}
    made = {**body, "steps": steps, "formats": [], "calibration": TEXT, "evaluation": evaluation}
    return hosts.clients[api].submit(made).id


def tensors(hosts: Hosts, api: str, job_id: str, folder: Path) -> dict[str, str]:
    """sha256 of every file of tensors as an API sends it."""
    client = hosts.clients[api]
    files = [artifact for artifact in client.artifacts(job_id) if artifact.path.endswith(".safetensors")]
    paths = [client.download_artifact(artifact, folder / api / job_id) for artifact in files]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in paths}


def word(installation: Installation, name: str, event: str) -> str:
    """The worker's last line of a kind."""
    lines = [line for line in installation[name].log.read_text().splitlines() if f'"{event}"' in line]
    return lines[-1] if lines else ""


def test_a_job_outlives_a_pulled_cable_and_a_lost_host(hosts: Hosts, upload: str, tmp_path: Path) -> None:
    """Each costs what was finished since the last interval; the result is that of a job that nobody disturbed."""
    installation = hosts.installation
    undisturbed = submit(hosts, "api0", upload)
    installation.wait_for_status(undisturbed, "succeeded", "failed", seconds=600)
    job_id = submit(hosts, "api1", upload)

    wait_until_quantizing(installation, job_id, 1, blocks_done=2)
    first = hosts.holder(job_id)
    assert first is not None
    wait_for(lambda: '"state_kept"' in installation[first].log.read_text(), 60, what="the first blocks in the bucket")
    time.sleep(2 * INTERVAL)
    hosts.hosts[first].cut()
    wait_for(lambda: hosts.holder(job_id) not in (None, first), 300, what="another host")
    second = hosts.holder(job_id)
    assert second is not None
    number = installation.job(job_id).attempt
    wait_until_quantizing(installation, job_id, number, blocks_done=4)
    assert "state_brought" in word(installation, second, "state_brought"), "it went on from what the first one had done"
    time.sleep(2 * INTERVAL)
    hosts.lose(second)
    hosts.hosts[first].mend()

    job = installation.wait_for_status(job_id, "succeeded", "failed", seconds=900)
    assert job.status is JobStatus.SUCCEEDED, job.error
    computed = blocks_computed(installation, job_id)
    lost = len(installation.attempts(job_id)) - 1
    assert set(computed) <= set(range(BLOCKS))
    assert len(computed) <= BLOCKS + 2 * lost, "of each host at most what it finished within an interval"
    expected = tensors(hosts, "api0", undisturbed, tmp_path)
    assert expected
    for api in APIS:
        assert tensors(hosts, api, job_id, tmp_path) == expected
    assert hosts.clients["api1"].artifacts(job_id) == hosts.clients["api0"].artifacts(job_id)
    installation[second].start()  # a new machine of that name, with an empty disk
    hosts.hosts[second].mend()


def test_one_api_does_what_the_other_one_did(hosts: Hosts, upload: str) -> None:
    hosts.installation["api0"].kill()
    try:
        job_id = submit(hosts, "api1", upload, steps=1)
        assert hosts.clients["api1"].wait(job_id).status is JobStatus.SUCCEEDED
    finally:
        hosts.installation["api0"].start()
    assert hosts.clients["api0"].job(job_id).status is JobStatus.SUCCEEDED


def test_an_upgrade_replaces_processes_in_turn_under_running_jobs(hosts: Hosts, upload: str, tmp_path: Path) -> None:
    """The database first, then each process: APIs stay ready, no job fails, blocks of the old release are adopted."""
    installation = hosts.installation
    jobs = [submit(hosts, APIS[number % 2], upload) for number in range(4)]
    wait_until_quantizing(installation, jobs[0], 1, blocks_done=2)
    source = next_release(tmp_path / "next")
    migrate = installation["api0"]
    environment = {**migrate.environment, "PYTHONPATH": str(source)}
    words = hosts.hosts["api0"].command([*migrate.command[2:4], "bitwright.cli", "migrate"])
    run(words, environment)
    for api in APIS:
        assert ready(hosts, api), "an API of the release before goes on"
    jobs.append(submit(hosts, "api0", upload))
    for name in (*APIS, "sweep", *WORKERS):
        assert installation[name].stop(90) == 0
        hosts.run_from(name, source)
        installation[name].start()
        if name in APIS:
            wait_for(partial(ready, hosts, name), 120, what=name)
            jobs.append(submit(hosts, name, upload))
    for job_id in jobs:
        job = installation.wait_for_status(job_id, "succeeded", "failed", seconds=900)
        assert job.status is JobStatus.SUCCEEDED, job.error
        attempts = installation.attempts(job_id)
        assert [attempt.error for attempt in attempts] == [None] * len(attempts)
        assert len(blocks_computed(installation, job_id)) <= BLOCKS + 2 * (len(attempts) - 1)
    assert len({str(sorted(tensors(hosts, "api1", job_id, tmp_path).values())) for job_id in jobs}) == 1


def ready(hosts: Hosts, api: str) -> bool:
    try:
        return httpx.get(f"http://{hosts.hosts[api].address}:{API_PORT}/readyz", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def run(words: list[str], environment: dict[str, str]) -> None:
    finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def next_release(folder: Path) -> Path:
    """The sources with one migration more."""
    folder.mkdir()
    copy_source(folder)
    root = Path(__file__).parents[2]
    shutil.copytree(root / "migrations", folder / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    versions = folder / "migrations" / "versions"
    last = max(file.name[:4] for file in versions.glob("[0-9]*.py"))
    following = f"{int(last) + 1:04d}"
    (versions / f"{following}_next.py").write_text(MIGRATION.format(next=following, last=last))
    return folder
