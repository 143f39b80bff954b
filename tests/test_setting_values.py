"""Every setting refuses nonsense by a message with its variable's name, and no message tells a secret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from app.queue import celery_app
from app.settings import Settings, get_settings, problems_of, unknown_variables, warn_of_unknown_variables
from bitwright.errors import InvalidSettings

NONSENSE = {
    "environment": ["staging", "1"],
    "data_dir": ["/etc/hostname", "/etc/hostname/below", "/" + "x" * 300, "~nobody-of-this-name/data"],
    "database_url": [
        *("nonsense", "mysql://u:secret@host/db", "sqlite://", "sqlite:///:memory:", "sqlite:///relative.db"),
        *("sqlite://host/file.db", "sqlite:////tmp", "postgresql://", "postgresql://u:secret@host:port/db"),
        *("postgresql+asyncpg://host/db", "postgresql://u:se/cret@host/db", "postgresql://ho st/db", "http://host/db"),
        *("postgresql://u:se#cret@host/db", "postgresql://host:70000/db"),
    ],
    "broker_url": [
        *("nonsense", "amqp://u:secret@host", "sqs://", "memory://", "redis://", "redis://:6379/0", "http://host"),
        *("redis://host:port/0", "redis://host:70000/0", "redis://host:0/0", "redis://host/zero", "redis://ho st/0"),
        *("redis://u:secret@host/0?unknown=1", "valkey://host/0?ssl_cert_reqs=none", "rediss://host/0?ssl_cert_reqs=x"),
        *("redis+socket://relative/path", "redis+socket:///" + "x" * 120, "redis+socket:///s?virtual_host=a"),
        *("redis://a:6379/0;redis://b:6379/0", "sentinel://host:26379/0", "redis://300.1.2.3/0", "valkey:/host"),
    ],
    "blob_url": [
        *("relative/folder", "http://host/blobs", "s3://", "s3:///prefix", "file://host/folder", "file:relative"),
        *("/etc/hostname", "file:///etc/hostname/below", "ftp://host/x"),
    ],
    "workspace_dir": ["/etc/hostname", "/etc/hostname/below"],
    "upload_dir": ["/etc/hostname"],
    "model_roots": ["/etc/hostname", '["/models"', "[1, 2]", '{"a": 1}x:/etc/hostname'],
    "hub_enabled": ["maybe", "2"],
    "hub_preflight": ["maybe", "2"],
    "hub_endpoint": [
        "mirror",
        "ftp://mirror",
        "https://",
        "https://u:secret@ho st",
        "https://mirror/?x=1",
        "http://a:b",
    ],
    "otlp_url": ["collector:4318", "grpc://collector:4317", "http://u:secret@ho st/v1/traces", "https://"],
    "otlp_headers": ["key=secret", "[1]", '{"na me": "secret"}', '{"key": "secret\\nsecret"}', '{"key": 1}'],
    "hub_token": ["two words", "line\nend", "sécret"],
    "database_password": ["line\nend", "tab\tbed"],
    "broker_password": ["line\n"],
    "host": ["http://127.0.0.1", "127.0.0.1:8080", "[::1]", "ho st", "256.1.1.1", "-dash", "a..b", "x" * 300],
    "port": ["seventy", "-1", "70000", "80.5", "tcp://10.0.0.1:8080"],
    "dashboard": ["maybe", "2"],
    "page_hosts": ["http://name", "name:8080", "a/b", "good.example, b@d"],
    "accelerated_path": ["blobs", "/blobs/", "/v1/blobs", "/a b", "http://a/b", "/../etc"],
    "max_body_bytes": ["1MB", "0", "-1", "1e99"],
    "max_upload_bytes": ["200 GiB", "0", str(1 << 60)],
    "max_streams_of_key": ["0", "many", "1000001"],
    "max_streams": ["0", "many", "1000001"],
    "event_poll_seconds": ["0", "-1", "inf", "nan", "31", "soon"],
    "tenant_quotas": [
        "ten",
        '{"queued": 1}',
        '{"queued_jobs": -1}',
        '{"queued_jobs": "many"}',
        "[1]",
        '{"streams": 1.5}',
    ],
    "token_keys": ["secret", "c2VjcmV0", "secret" * 8, "sécret"],
    "webhook_allowed": ["http://hooks.internal", "10.0.0.0/99", "hooks.internal:8080", "a/b"],
    "audit_retention_days": ["0", "-1", "week", "1e6"],
    "price_per_gpu_hour": ["-1", "free", "inf", "nan", "0.0000001", "2 EUR"],
    "price_per_cpu_hour": ["-1", "free", "nan"],
    "price_currency": ["eur", "EURO", "€"],
    "metrics_by_tenant": ["maybe", "2"],
    "worker_metrics_port": ["0", "70000", "metrics"],
    "worker_metrics_host": ["http://127.0.0.1", "127.0.0.1:9100"],
    "input_seconds": ["0", "soon", "inf", "86401"],
    "input_memory_bytes": ["1GB", "0", str(1 << 60)],
    "attempt_memory": ["on", "4 GiB", "1000", "-1"],
    "attempt_network": ["none", "1"],
    "attempt_user": ["0", "root", "nobody-of-this-name", "-1", "4294967295"],
    "lease_seconds": ["2", "0", "soon", "3601", "inf"],
    "sweep_interval_seconds": ["0", "inf", "nan", "3601", "5s"],
    "job_time_limit_seconds": ["0", "1d", str(31 * 86_400)],
    "job_retention_days": ["0", "-1", "week", "1e6"],
    "workspace_retention_days": ["-1", "inf", "nan", "week"],
    "keep_state_seconds": ["often", "0", "0.5", "86401", "nan", "inf"],
    "hub_retention_days": ["0.5", "inf", "nan", "week"],
    "worker_poll_seconds": ["0", "inf", "nan", "301", "soon"],
    "device": ["tpu", "gpu", "cuda:0"],
    "devices": ["0", "-1", "some", "65", "1.5"],
    "spares": ["-1", "9", "one", "1.5"],
    "kernel_dir": ["/etc/hostname", "/etc/hostname/below"],
    "llama_cpp": ["/etc/hostname", "/" + "x" * 300],
    "vllm_python": ["/etc", "/" + "x" * 300, "~nobody-of-this-name/bin/python"],
    "worker_name": ["two words", "a/b", "gpu%h", "a@b", "-x", "x" * 161],
    "log_format": ["xml", "text"],
    "log_level": ["LOUD", "5"],
}
"""A few slips for each setting; a setting that is added without any fails the first test."""
CASES = [(name, value) for name, values in NONSENSE.items() for value in values]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BITWRIGHT_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    get_settings.cache_clear()


def test_every_setting_is_here() -> None:
    assert NONSENSE.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda text: str(text)[:40])
def test_nonsense_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    variable = f"BITWRIGHT_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (said,) = problems_of(caught.value)
    assert said.startswith(f"{variable} is ")
    assert len(said) > len(variable) + 25, "what is wrong, and what it may be"
    for text in (said, str(caught.value)):
        assert "secret" not in text.replace("***", ""), "no password, no token"
        assert "se/cret" not in text
    with pytest.raises(InvalidSettings, match=variable):
        get_settings()


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "x", "BROKER_URL": "x", "DATA_DIR": "/etc/hostname"}.items():
        monkeypatch.setenv(f"BITWRIGHT_{name}", value)
    with pytest.raises(InvalidSettings) as caught:
        get_settings()
    assert [name in caught.value.detail for name in ("_PORT", "_BROKER_URL", "_DATA_DIR")] == [True] * 3
    assert "factory" not in caught.value.detail


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("valkey://host", "redis://host"),
        ("valkey://user:pass%2Fword@host:6379/3", "redis://user:pass%2Fword@host:6379/3"),
        ("valkeys://host/1", "rediss://host/1?ssl_cert_reqs=required"),
        ("rediss://host/1?ssl_cert_reqs=none", "rediss://host/1?ssl_cert_reqs=none"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis+socket:///run/valkey.sock", "redis+socket:///run/valkey.sock"),
        ("valkey+socket:///run/valkey.sock?virtual_host=2", "redis+socket:///run/valkey.sock?virtual_host=2"),
        ("unix:///run/valkey.sock?db=2", "redis+socket:///run/valkey.sock?virtual_host=2"),
        ("redis://cache_1.internal.:6379", "redis://cache_1.internal.:6379"),
    ],
)
def test_brokers_by_every_name(monkeypatch: pytest.MonkeyPatch, given: str, taken: str) -> None:
    """Celery's own transport is the judge: it makes a connection of what comes out, and finds the same server there."""
    monkeypatch.setenv("BITWRIGHT_BROKER_URL", given)
    settings = Settings()
    assert settings.broker_url == taken
    with celery_app(settings.broker_url).connection_for_write() as connection:
        assert connection.transport.driver_type == "redis"
        assert ("socket" in taken) == (connection.hostname or "").startswith("socket://")


def test_a_server_is_reached_by_the_names_of_valkey(broker_url: str) -> None:
    for given in (broker_url, broker_url.replace("redis://", "valkey://")):
        taken = Settings.model_validate({"broker_url": given}).broker_url
        with celery_app(taken).connection_for_write() as connection:
            assert connection.default_channel.queue_declare("work.none").message_count == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", "postgresql+psycopg://u:p%23w@host:5432/name?sslmode=require"),
        ("database_url", "postgresql+psycopg://postgres@/name?host=/run/postgresql"),
        ("database_url", "sqlite:////var/lib/bitwright.db"),
        ("blob_url", "s3://bucket/prefix"),
        ("blob_url", "/var/lib/blobs"),
        ("blob_url", "file:///var/lib/blobs%20two"),
        ("host", "::"),
        ("host", "localhost"),
        ("hub_endpoint", "https://mirror.example:8443/hub"),
        ("log_level", "info"),
        ("worker_name", "gpu-node_7.rack"),
        ("devices", "all"),
        ("max_upload_bytes", "1024"),
    ],
)
def test_what_is_right_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"BITWRIGHT_{name.upper()}", value)
    taken = str(getattr(Settings(), name))
    assert taken == (value.upper() if name == "log_level" else value)


@pytest.mark.parametrize("password", ["p@ss:w/o#r?d%", "100%25", "ünï cödé", "'; --"])
def test_a_password_is_given_as_it_is(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    """The libraries that connect are the judges: they read the same password from the address."""
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", "postgresql+psycopg://user@host:5432/name")
    monkeypatch.setenv("BITWRIGHT_DATABASE_PASSWORD", password)
    monkeypatch.setenv("BITWRIGHT_BROKER_URL", "valkey://host:6379/3")
    monkeypatch.setenv("BITWRIGHT_BROKER_PASSWORD", password)
    settings = Settings()
    database = make_url(settings.database_url)
    assert (database.username, database.password, database.host, database.port) == ("user", password, "host", 5432)
    with celery_app(settings.broker_url).connection_for_write() as connection:
        assert (connection.password, connection.hostname, connection.virtual_host) == (password, "host", "3")


def test_two_passwords_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", "postgresql+psycopg://user:first@host/name")
    monkeypatch.setenv("BITWRIGHT_DATABASE_PASSWORD", "second")
    with pytest.raises(ValidationError, match="a password of its own") as caught:
        Settings()
    assert "first" not in str(caught.value)
    assert "second" not in str(caught.value)


def test_an_address_without_a_server_takes_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_DATABASE_PASSWORD", "word")
    for url in ("sqlite:////var/lib/bitwright.db", "postgresql+psycopg:///name?host=/run/postgresql"):
        monkeypatch.setenv("BITWRIGHT_DATABASE_URL", url)
        assert Settings().database_url == url


def test_a_slip_in_a_variables_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_DATABSE_URL", "postgresql://u:secret@host/name")
    with pytest.raises(
        ValidationError, match=r"BITWRIGHT_DATABSE_URL .* did you mean BITWRIGHT_DATABASE_URL"
    ) as caught:
        Settings()
    assert "secret" not in str(caught.value)


def test_other_peoples_variables_are_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Variables of the client, the tests or a supervisor are known; those of an orchestrator are only reported."""
    for name in ("URL", "KEY", "TEST_CACHE", "JOB_ID", "SERVICE_HOST", "PORT_8080_TCP_ADDR"):
        monkeypatch.setenv(f"BITWRIGHT_{name}", "x")
    Settings()
    assert unknown_variables() == {"BITWRIGHT_SERVICE_HOST": None, "BITWRIGHT_PORT_8080_TCP_ADDR": None}
    warn_of_unknown_variables()
    assert "BITWRIGHT_SERVICE_HOST" in capsys.readouterr().out


def test_a_hosts_name_of_any_kind_names_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "_büro rechner%h")
    assert Settings().worker_name == "b-ro-rechner-h"


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "workers"],
        ["-m", "workers.sweep"],
        ["-m", "bitwright.cli", "serve"],
        ["-m", "bitwright.cli", "worker"],
        ["-m", "bitwright.cli", "api"],
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_processes_and_commands_say_it_without_a_trace(command: list[str]) -> None:
    environment = os.environ | {"BITWRIGHT_BROKER_URL": "amqp://u:secret@host"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "BITWRIGHT_BROKER_URL" in said
    assert "valkey://" in said
    assert "Traceback" not in said
    assert "secret" not in said


def test_a_client_is_told_how_an_address_looks(tmp_path: Path) -> None:
    environment = os.environ | {"BITWRIGHT_URL": "localhost:8080", "BITWRIGHT_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "bitwright.cli", "jobs"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "BITWRIGHT_URL" in done.stderr
    assert "http://127.0.0.1:8080" in done.stderr
