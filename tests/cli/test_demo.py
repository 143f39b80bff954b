"""The demo's requests; the demo itself is run by hand and by `make demo`."""

import subprocess
from pathlib import Path

import pytest

from app.cli.demo import METHOD, _model_roots, _quick_tuning
from app.cli.installed import how_to_call
from app.domain.inputs.roots import check_links
from app.domain.methods import METHODS
from tests.api.checkpoints import as_hub_cache, write_checkpoint
from tests.cli.processes import command


def test_a_snapshot_of_a_hub_cache_may_be_read_with_its_blobs(tmp_path: Path) -> None:
    snapshot = as_hub_cache(write_checkpoint(tmp_path / "made"), tmp_path / "cache")
    roots = _model_roots(snapshot)
    assert roots == [tmp_path / "cache" / "models--org--model"]
    check_links(snapshot, tuple(roots))
    assert _model_roots(tmp_path / "made") == [tmp_path / "made"]
    assert _model_roots(Path("org/name")) == []


@pytest.mark.parametrize("method", [*METHODS, "auto-round", "nonesuch"])
def test_a_method_by_its_plain_name_is_tuned_quickly(method: str) -> None:
    quick = _quick_tuning(method, None, None)
    takes = METHODS[method].spec.model_fields if method in METHODS else {}
    assert quick["preset"] == ("light" if "preset" in takes else None)
    assert quick["batch_size"] in ({1, 2} if "batch_size" in takes else {None})
    assert _quick_tuning(method, "best", 8) == {"preset": "best", "batch_size": 8}


def test_the_default_method_is_one_of_the_table() -> None:
    assert METHOD in METHODS


def test_a_folder_that_holds_something_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"another")
    done = command("demo", "--output", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 2, done.stderr
    assert "model.safetensors" in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_way_to_call_the_command_is_told_where_its_name_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "bitwright", "activate"):
        (programs / name).write_text("#!/bin/sh\necho called\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    told = how_to_call()
    assert told == "`.venv/bin/bitwright`, or `bitwright` after `source .venv/bin/activate`"
    assert subprocess.check_output([told.split("`")[1]], text=True) == "called\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert how_to_call() == f"`{programs}/bitwright`, or `bitwright` after `source {programs}/activate`"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert how_to_call() is None
