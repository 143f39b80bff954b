"""The Dockerfile's steps for the API's image as they stand there, in folders in place of an image: `make test-image`.

What a container's own root would give is left out: packages of Debian are asked for and not installed, and the user of
the image is a number alone.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.test_deployment import STAGES, last
from tests.documentation import ROOT
from tests.servers import free_port

HERE = "BITWRIGHT_TEST_IMAGE"
"""Variable that says that steps may install from the network."""
MADE_HERE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
PREFIX, USER = "/opt/bitwright", 10001

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(HERE not in os.environ, reason=f"it installs from an index of packages, where {HERE} is set"),
]


def shell(step: str, folder: Path, installed: Path) -> None:
    """Run a step with its paths in these folders."""
    words = re.sub(r"--mount=\S+\s+", "", step).replace(PREFIX, str(installed))
    path = f"{installed}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    known = {name: value for name, value in os.environ.items() if not name.startswith(("BITWRIGHT_", "PYTHON"))}
    known.pop("VIRTUAL_ENV", None)
    done = subprocess.run(
        ["sh", "-ec", words], cwd=folder, env={**known, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `build-api` leaves in /opt/bitwright."""
    source, installed = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("opt") / "bitwright"
    for word, rest in STAGES["build-api"]:
        if word == "COPY":
            *given, place = rest.split()
            for name in given:
                target = source / place / (Path(name).name if place.endswith(("/", ".")) else "")
                target.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, dirs_exist_ok=True, ignore=MADE_HERE)
                else:
                    shutil.copy(ROOT / name, target)
        elif word == "RUN":
            shell(rest, source, installed)
    shutil.rmtree(source)  # an image has what was installed, and no sources
    return installed


def test_every_command_is_there_and_torch_is_not(image: Path, tmp_path: Path) -> None:
    commands = ("api", "sweep", "migrate", "keys", "tenants", "backup", "gc")
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for words in (["--help"], *([name, "--help"] for name in commands)):
        line = [str(image / "bin" / "bitwright"), *words]
        done = subprocess.run(line, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    program = "import importlib.util, sys; sys.exit(int(importlib.util.find_spec('torch') is not None))"
    assert (
        subprocess.run([image / "bin" / "python", "-c", program], env=bare, cwd=tmp_path, check=False).returncode == 0
    )
    program = "import opentelemetry.exporter.otlp.proto.http, psycopg, uvloop"
    assert (
        subprocess.run([image / "bin" / "python", "-c", program], env=bare, cwd=tmp_path, check=False).returncode == 0
    )


def account() -> int | None:
    """The image's user, where this is root and that user gets at the Python that it is made of; else our own."""
    reachable = all(place.stat().st_mode & 0o001 for place in Path(sys.base_prefix, "bin").parents)
    return USER if os.getuid() == 0 and reachable else None


def test_it_serves_as_its_user_and_is_found_healthy_by_its_own_command(image: Path, tmp_path: Path) -> None:
    data, port, user = tmp_path / "data", free_port(), account()
    data.mkdir()
    if user is not None:
        os.chown(data, user, user)
        for folder in (tmp_path, *tmp_path.parents, *image.parents):
            folder.chmod(folder.stat().st_mode | 0o011)
    settings = {"BITWRIGHT_DATA_DIR": str(data), "BITWRIGHT_PORT": str(port), "BITWRIGHT_LOG_FORMAT": "json"}
    environment = {"PATH": f"{image}/bin:/usr/bin:/bin", "HOME": str(data), **settings}
    program = re.search(r"\"(import urllib.*)\"", last("api", "HEALTHCHECK"))
    assert program is not None
    healthy = [str(image / "bin" / "python"), "-c", program[1].replace(":8080", f":{port}")]

    as_user: dict[str, Any] = {"env": environment, "cwd": "/"}
    as_user |= {} if user is None else {"user": user, "group": user, "extra_groups": []}

    def run(words: list[str]) -> int:
        return subprocess.run(words, capture_output=True, check=False, **as_user).returncode

    assert run([str(image / "bin" / "bitwright"), "migrate"]) == 0, (
        "what was installed is the code, and no empty package"
    )
    assert run(healthy) != 0, "nothing answers yet"
    serving = subprocess.Popen([str(image / "bin" / "bitwright"), "api"], **as_user)
    try:
        deadline = time.monotonic() + 60
        while run(healthy) != 0:
            assert time.monotonic() < deadline
            assert serving.poll() is None
            time.sleep(0.5)
    finally:
        serving.terminate()
        assert serving.wait(60) == 0


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no Debian")
def test_packages_of_debian_that_the_worker_installs_are_there() -> None:
    step = next(rest for word, rest in STAGES["worker"] if word == "RUN" and "apt-get install" in rest)
    names = [name for name in step.partition("install")[2].partition("&&")[0].split() if not name.startswith("-")]
    line = ["apt-get", "install", "--simulate", "--no-install-recommends", *names]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names == ["gcc", "libc6-dev"]
