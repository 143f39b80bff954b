"""The stamp of what a process is made of: code, libraries, driver and variables change it, and nothing else."""

from pathlib import Path

import pytest

from workers.supervise.spares import stamp as stamps
from workers.supervise.spares.stamp import stamp


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("app/a.py", "bitwright/b.py", "workers/engine/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize("name", ["app/a.py", "bitwright/b.py", "workers/engine/c.py"])
def test_a_changed_file_changes_the_stamp(root: Path, name: str) -> None:
    before = stamp({}, root)
    assert stamp({}, root) == before
    (root / name).write_text("x = 1 + 1\n")
    assert stamp({}, root) != before


def test_a_file_that_comes_or_goes_changes_the_stamp(root: Path) -> None:
    before = stamp({}, root)
    (root / "workers" / "engine" / "d.py").write_text("")
    between = stamp({}, root)
    (root / "app" / "a.py").unlink()
    assert len({before, between, stamp({}, root)}) == 3


def test_what_python_writes_itself_changes_nothing(root: Path) -> None:
    before = stamp({}, root)
    (root / "workers" / "__pycache__").mkdir()
    (root / "workers" / "__pycache__" / "c.py").write_text("")
    (root / "workers" / "notes.txt").write_text("")
    assert stamp({}, root) == before


def test_the_driver_the_libraries_and_the_variables_are_part_of_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    found = [stamp({}, root, driver), stamp({"A": "1"}, root, driver), stamp({"A": "2"}, root, driver)]
    driver.write_text("NVRM version: 580.65")
    found.append(stamp({}, root, driver))
    monkeypatch.setattr(stamps, "version", lambda _: "9.9")
    found.append(stamp({}, root, driver))
    assert len(set(found)) == 5
