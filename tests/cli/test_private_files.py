"""A data folder of before, with files that every user reads, is closed when a process of the service starts."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli.private_files import keep_private
from app.settings import Settings
from bitwright.errors import Conflict
from tests.cli.processes import command


@pytest.fixture(autouse=True)
def own_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_there_is_closed_and_what_comes_is_private(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("blobs", "uploads", "workspaces"):
        (data / folder).mkdir(parents=True)
    (data / "blobs").chmod(0o2750)
    for name in ("bitwright.db", "bitwright.db-wal", "client.json", "serve.log", "notes.txt"):
        (data / name).write_text("x")
    keep_private(Settings.model_validate({"data_dir": data}))
    closed = {path.name: mode(path) for path in data.iterdir()}
    assert closed == {
        **dict.fromkeys(("bitwright.db", "bitwright.db-wal", "client.json", "serve.log"), 0o600),
        **dict.fromkeys(("uploads", "workspaces"), 0o750),
        "blobs": 0o2750,  # a group that was let in stays
        "notes.txt": 0o644,  # not ours
    }
    (data / "new").mkdir()
    assert mode(data / "new") == 0o700
    assert mode(data) == 0o755  # it may be a home


def test_a_fresh_data_folder_is_private(tmp_path: Path) -> None:
    assert command("migrate", "--data-dir", str(tmp_path / "data")).returncode == 0
    assert mode(tmp_path / "data") == 0o700
    assert mode(tmp_path / "data" / "bitwright.db") == 0o600


def test_a_folder_in_which_everybody_may_replace_files_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o777)
    with pytest.raises(Conflict, match="every user may replace"):
        keep_private(Settings.model_validate({"data_dir": data}))
    data.chmod(0o1777)
    keep_private(Settings.model_validate({"data_dir": data}))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_somebody_elses_open_file_is_refused() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # below pytest's folder only its owner gets
        folder = Path(name)
        folder.chmod(0o1777)
        (folder / "client.json").write_text("{}")
        code = f"""
import os
from app.settings import Settings
from app.cli.private_files import keep_private
settings = Settings.model_validate({{"data_dir": {name!r}}})
os.setgid(65534); os.setuid(65534)
keep_private(settings)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is open to other users (mode 644), and another user's to close" in done.stderr
        assert mode(folder / "client.json") == 0o644
