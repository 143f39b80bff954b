"""A process that is killed leaves its folder to the next one, which removes it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.inspection import own_folder
from app.inspection.own_folder import OwnFolder

PROGRAM = """
import sys, time
from app.inspection.own_folder import OwnFolder
folder = OwnFolder()
(folder.path / "file").write_text("left")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_folders_of_ended_processes_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    others = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (Path(process.stdout.readline().strip()) for process in others if process.stdout)
        os.kill(others[0].pid, signal.SIGKILL)
        others[0].wait()
        (tmp_path / "another").mkdir()
        OwnFolder().remove()
        assert killed.exists(), "it might be one that is being made"
        monkeypatch.setattr(own_folder, "YOUNG_SECONDS", 0.0)
        own = OwnFolder()
        assert sorted(tmp_path.iterdir()) == sorted([alive, own.path, tmp_path / "another"])
        own.remove()
        assert not own.path.exists()
    finally:
        for process in others:
            process.kill()
            process.communicate()
