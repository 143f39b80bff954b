"""Exit codes and output of each kind of error, against the real API."""

import json
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import pytest
import structlog
from sqlalchemy import select, update

from app.store.models import Job, Tenant
from bitwright import Client
from bitwright.cli.watch import waiting_text
from tests.bitwright.service import Service, running_service
from tests.cli.processes import bitwright, command


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The API runs in this process, as do most commands: it logs to a file, so that their output is their own."""
    folder, before = tmp_path_factory.mktemp("service"), structlog.get_config()
    with (folder / "api.log").open("w") as log, running_service(folder) as running:
        structlog.reset_defaults()
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))
        yield running
    structlog.configure(**before)


def flags(service: Service) -> tuple[str, ...]:
    return ("--url", f"http://127.0.0.1:{service.port}", "--key", service.key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["org/name", "--method", "rtn", "--bits", "9"], "bits"),
        (["org/name", "--method", "nonesuch"], "there is no method"),
        (["--method", "rtn"], "model"),
        (["/etc", "--method", "rtn"], "model"),
        (["org/name", "--method", "rtn", "--format", "floppy"], "formats"),
        (["org/name", "--method", "rtn", "--override", "x"], "PATTERN=BITS"),
        (["org/name", "--bits", "four"], "--bits"),
        (["--file", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["org/name", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_bad_request_exits_with_2(service: Service, arguments: list[str], message: str) -> None:
    done = command("submit", *arguments, *flags(service))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "job_" not in done.stdout


def test_an_upload_prints_the_id_that_a_request_takes(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row"}\n' * 100)
    done = command("upload", str(rows), *flags(service))
    assert done.returncode == 0, done.stderr
    upload = done.stdout.strip()
    assert upload.startswith("upl_")
    request = tmp_path / "request.yaml"
    request.write_text(f"method: qlora\nfinetune: {{dataset: {upload}}}\n")
    job = command("submit", "org/name", "--file", str(request), *flags(service))
    assert (job.returncode, job.stdout[:4]) == (0, "job_"), job.stderr
    again = command("upload", str(rows), "--resume", upload, *flags(service))
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    missing = command("upload", str(tmp_path / "none.jsonl"), *flags(service))
    assert missing.returncode == 2
    assert "none.jsonl is not a file" in missing.stderr


def test_a_wrong_key_and_an_unknown_job_exit_with_2(service: Service) -> None:
    url = flags(service)[:2]
    stranger = bitwright("jobs", *url, BITWRIGHT_KEY="bw_wrong")
    assert (stranger.returncode, stranger.stderr.split(":")[0]) == (2, "unauthenticated")
    unknown = command("show", "job_00000000000000000000000000", *flags(service))
    assert (unknown.returncode, unknown.stderr.split(":")[0]) == (2, "not_found")


def test_an_unreachable_service_exits_with_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = bitwright("jobs", "--url", f"http://127.0.0.1:{port}", "--data-dir", str(tmp_path))
    assert done.returncode == 3
    assert str(port) in done.stderr
    assert "bitwright serve" in done.stderr


def test_a_stored_key_goes_to_no_other_address(service: Service, tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "key": service.key}))
    done = command("jobs", *flags(service)[:2], "--data-dir", str(tmp_path))
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "unauthenticated")


def test_a_dry_run_prints_the_full_request_and_queues_nothing(service: Service) -> None:
    arguments = ["org/name", "--method", "signround", "--preset", "light", "--metadata", "dry=run"]
    done = command("submit", *arguments, "--dry-run", *flags(service))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["request"]["quantization"]["steps"] == 50
    assert command("jobs", "--json", "--metadata", "dry=run", *flags(service)).stdout == ""


def test_a_scheme_by_name_and_a_limit_of_time_are_flags(service: Service) -> None:
    arguments = ["org/name", "--method", "rtn", "--scheme", "fp8", "--time-limit", "60", "--dry-run"]
    done = command("submit", *arguments, *flags(service))
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)["request"]
    assert (request["quantization"]["scheme"], request["time_limit_seconds"]) == ("fp8", 60)


def test_a_job_that_waits_has_no_result_and_is_told_so(service: Service, tmp_path: Path) -> None:
    job_id = command("submit", "org/name", "--method", "rtn", *flags(service)).stdout.strip()
    for asked in (("download", job_id, str(tmp_path / "result")), ("report", job_id), ("compare", job_id, job_id)):
        refused = command(*asked, *flags(service))
        assert (refused.returncode, refused.stderr.split(":")[0]) == (2, "conflict")
        assert f"{job_id} is queued and has no " in refused.stderr
        assert f"`bitwright watch {job_id}`" in refused.stderr
    assert not (tmp_path / "result").exists()
    assert command("cancel", job_id, *flags(service)).returncode == 0
    ended = command("download", job_id, str(tmp_path / "result"), *flags(service))
    assert f"{job_id} is cancelled and has no result" in ended.stderr
    assert f"`bitwright retry {job_id}`" in ended.stderr


def test_a_job_that_no_worker_will_take_is_told_so(service: Service) -> None:
    with Client(service.url, service.key) as client:
        job_id = client.submit({"model": "org/name", "method": "rtn"}).id
        waits = waiting_text(client, job_id)
        assert waits is not None
        assert waits.startswith("number ")
        assert waits.endswith("no worker is alive: `bitwright serve` or `worker` starts one")
        client.cancel(job_id)
        assert waiting_text(client, job_id) is None


def test_a_question_that_nobody_answers_names_the_flag(service: Service) -> None:
    job_id = command("submit", "org/name", "--method", "rtn", *flags(service)).stdout.strip()
    refused = command("delete", job_id, *flags(service))
    assert refused.returncode == 2
    assert "--yes" in refused.stderr


def test_the_version_is_that_of_the_distributions() -> None:
    done = command("--version")
    assert done.returncode == 0, done.stderr
    versions = [f"{name} {version(name)}" for name in ("bitwright", "bitwright-service")]
    assert done.stdout.splitlines() == versions


def test_a_file_and_flags_make_one_request(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: org/name\nmethod: rtn\nbits: 8\nmetadata: {from: file}\n")
    arguments = ["--file", str(file), "--bits", "3", "--metadata", "more=yes", "--json"]
    done = command("submit", *arguments, *flags(service))
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["request"]["quantization"]["bits"] == 3
    assert job["metadata"] == {"from": "file", "more": "yes"}


def test_a_job_of_another_version_is_listed_and_shown(service: Service) -> None:
    job_id = json.loads(command("submit", "org/name", "--method", "rtn", "--json", *flags(service)).stdout)["id"]
    with service.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(request={"from": "the future"}))
    assert job_id in command("jobs", *flags(service)).stdout
    shown = command("show", job_id, *flags(service))
    assert shown.returncode == 0
    assert "of another version" in shown.stdout
    assert json.loads(command("show", job_id, "--json", *flags(service)).stdout)["request"] == {"from": "the future"}


def test_methods_are_listed(service: Service) -> None:
    done = command("methods", *flags(service))
    assert done.returncode == 0
    assert "arXiv:2309.05516" in done.stdout


def test_keys_are_made_listed_and_revoked(service: Service) -> None:
    where = ("--data-dir", str(service.folder))
    made = command("keys", "create", "--name", "ci", "--scope", "read", *where)
    key = made.stdout.strip()
    assert key.startswith("bw_")
    url = flags(service)[:2]
    assert command("jobs", *url, "--key", key).returncode == 0
    refused = command("submit", "org/name", "--method", "rtn", *url, "--key", key)
    assert (refused.returncode, refused.stderr.split(":")[0]) == (2, "missing_scope")
    row = next(line for line in command("keys", "list", *where).stdout.splitlines() if "\tci\t" in line)
    assert key not in row
    assert command("keys", "revoke", row.split()[0], *where).returncode == 0
    # The service goes on knowing a key for a second that another process has revoked.
    until = monotonic() + 20
    while (again := command("jobs", *url, "--key", key)).returncode == 0:
        assert monotonic() < until, "it is still known"
    assert again.returncode == 2


def test_a_slip_in_a_tenants_name_makes_no_tenant(service: Service) -> None:
    where = ("--data-dir", str(service.folder))
    made = command("keys", "create", "--tenant", "research", "--new-tenant", *where)
    assert made.returncode == 0
    for words in (["create"], ["list"], ["revoke", "key_x"]):
        slip = command("keys", *words, "--tenant", "reserach", *where)
        assert (slip.returncode, slip.stdout) == (2, "")
        assert "not_found" in slip.stderr
        assert "did you mean research?" in slip.stderr
    with service.database.reading() as session:
        assert set(session.scalars(select(Tenant.name))) == {"default", "research"}
    assert command("keys", "create", "--tenant", "research", *where).returncode == 0
