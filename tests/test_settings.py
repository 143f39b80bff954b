"""Settings come from the environment, and everything has a place when nothing is set."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable of ours is set, and data goes into a folder of the test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BITWRIGHT_{name.upper()}", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def test_everything_lies_in_one_folder_by_default(bare_environment: Path) -> None:
    settings = Settings()
    home = bare_environment / "bitwright"
    assert settings.data_dir == home
    assert settings.database_url == f"sqlite:///{home}/bitwright.db"
    assert settings.blob_url == f"file://{home}/blobs"
    assert (settings.workspace_dir, settings.upload_dir) == (home / "workspaces", home / "uploads")
    assert (settings.broker_url, settings.model_roots, settings.host) == ("", (), "127.0.0.1")


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, bare_environment: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_DATA_DIR", str(bare_environment / "data"))
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", "postgresql://db/bitwright")
    monkeypatch.setenv("BITWRIGHT_LEASE_SECONDS", "60")
    monkeypatch.setenv("BITWRIGHT_BROKER_URL", "")
    settings = Settings()
    assert settings.workspace_dir == bare_environment / "data" / "workspaces"
    assert settings.database_url == "postgresql://db/bitwright"
    assert settings.heartbeat_seconds == 20


@pytest.mark.parametrize("value", ["/a:/b/c", '["/a", "/b/c"]', "/a::/b/c:"])
def test_roots_are_written_like_a_search_path(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BITWRIGHT_MODEL_ROOTS", value)
    assert Settings().model_roots == (Path("/a"), Path("/b/c"))


@pytest.mark.parametrize(
    ("name", "value"), [("PORT", "70000"), ("LOG_FORMAT", "xml"), ("DEVICE", "tpu"), ("LEASE_SECONDS", "soon")]
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"BITWRIGHT_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_HUB_TOKEN", "hf_secret")
    settings = Settings()
    assert settings.hub_token is not None
    assert settings.hub_token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in f"{settings!r} {settings.model_dump_json()}"
