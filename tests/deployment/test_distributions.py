"""Two distributions of one repository: `bitwright` for users, `bitwright-service` for operators."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli.embedded import EmbeddedService
from bitwright.cli.operator import INSTALL, OPERATOR_COMMANDS
from tests.cli.processes import clean_environment, command
from tests.documentation import ROOT

CLIENT: dict[str, Any] = tomllib.loads((ROOT / "bitwright" / "pyproject.toml").read_text(encoding="utf-8"))
SERVICE: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS: dict[str, str] = SERVICE["project"]["entry-points"]["bitwright.commands"]
CODE = [path for path in (ROOT / "bitwright").rglob("*.py") if "build" not in path.parts]
SHADOWS = ("app", "workers", "bitwright")


def test_both_have_the_same_version_and_the_service_needs_that_client() -> None:
    version = CLIENT["project"]["version"]
    assert (CLIENT["project"]["name"], SERVICE["project"]["name"]) == ("bitwright", "bitwright-service")
    assert SERVICE["project"]["version"] == version
    assert f"bitwright=={version}" in SERVICE["project"]["dependencies"]


def test_the_extras_name_the_service() -> None:
    inner = [need for needs in SERVICE["project"]["optional-dependencies"].values() for need in needs]
    assert [need for need in inner if need.startswith("bitwright[")] == []


def test_the_clients_packages_are_all_its_folders() -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in CODE}
    assert set(CLIENT["tool"]["setuptools"]["packages"]) == folders


def test_each_operators_command_is_there() -> None:
    assert set(COMMANDS) == set(OPERATOR_COMMANDS)
    for place in COMMANDS.values():
        module, _, name = place.partition(":")
        target = getattr(import_module(module), name)
        assert callable(target) or isinstance(target, typer.Typer)
    shown = command("--help").stdout
    assert all(f"\n  {name} " in shown for name in OPERATOR_COMMANDS)


@pytest.mark.parametrize("name", OPERATOR_COMMANDS)
def test_a_command_of_the_service_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.cli.operator.entry_points", lambda **_: ())
    done = command(name)
    assert done.returncode == 2
    assert f"`bitwright {name}` belongs to the service" in done.stderr
    assert INSTALL in done.stderr
    assert f"\n  {name} " not in command("--help").stdout


def test_the_clients_wheel_holds_the_client_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "bitwright", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    facts = f"bitwright-{CLIENT['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"bitwright", facts}
    assert "bitwright/py.typed" in names
    assert {name for name in names if name.endswith(".py")} == {path.relative_to(ROOT).as_posix() for path in CODE}


def test_every_child_starts_without_the_callers_folder_on_its_path() -> None:
    """`-P` before `-m`: else a folder named `app` where the command is called would be imported."""
    paths = [path for top in ("app", "workers") for path in (ROOT / top).rglob("*.py")]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    assert sum(text.count('sys.executable, "-P", "-m"') for text in sources.values()) >= 6
    assert [str(path) for path, text in sources.items() if 'sys.executable, "-m"' in text] == []


@pytest.mark.slow
def test_the_services_wheel_holds_every_file_of_its_packages(tmp_path: Path) -> None:
    """Templates, scripts and tables too, which no import would miss here."""
    tracked = subprocess.run(["git", "ls-files", "app"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in ("app", "workers", "migrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(tracked.split()) <= set(archive.namelist())


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody whose project has packages with our names."""
    for name in SHADOWS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of another project')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_in_a_folder_with_packages_of_the_same_names(shadowed: Path) -> None:
    environment = {**clean_environment(), "BITWRIGHT_DATA_DIR": str(shadowed / "data")}
    for arguments in (["migrate"], ["keys", "list"], ["worker", "--help"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bitwright.cli", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_service_quantizes_from_a_folder_with_packages_of_the_same_names(
    shadowed: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("BITWRIGHT_")]:
        monkeypatch.delenv(name)
    data = shadowed / "data"
    data.mkdir()
    with EmbeddedService(data, model_roots=[tiny_model.parent], device="cpu") as service, service.client() as client:
        body = {"model": str(tiny_model), "method": "rtn", "bits": 4, "group_size": 32, "evaluation": None}
        job = client.wait(client.submit(body).id)
    assert job.error is None, job.error
    assert job.status.value == "succeeded"
