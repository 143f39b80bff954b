"""`bitwright check` and the GitHub Action on it, against the real API: passed, missed, failed, no service."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from xml.etree.ElementTree import parse

import pytest
import structlog
import yaml

from app.store.attempts import AttemptWriter, claim
from bitwright.cli.comparison import Compared
from bitwright.cli.gates import Check, Outcome, against, gates, verdict
from bitwright.cli.summaries import junit, markdown, write_junit
from bitwright.errors import BitwrightError, NumericalFailure, RequirementMissed
from bitwright.job_states import DeviceClass
from bitwright.report import Report
from tests.bitwright.service import Service, running_service
from tests.cli.processes import command
from tests.documentation import ROOT
from tests.reports import QUALITY, report

ACTION = ROOT / ".github/actions/bitwright-check/action.yml"
REQUEST = {"model": "org/name", "method": "rtn", "bits": 4, "require": {"max_kl_divergence": 0.3}}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, before = tmp_path_factory.mktemp("service"), structlog.get_config()
    with (folder / "api.log").open("w") as log, running_service(folder) as running:
        structlog.reset_defaults()
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))
        yield running
    structlog.configure(**before)


def result(bytes_: int, kl: float) -> Report:
    size = report().size.model_copy(update={"bytes_quantized": bytes_})
    return report(size=size, quality=QUALITY.model_copy(update={"kl_divergence": kl}))


@contextmanager
def a_worker(service: Service, ends: Report | BitwrightError) -> Iterator[None]:
    """A hand that ends the next job like this, whenever it comes."""
    stopping = threading.Event()

    def work() -> None:
        while not stopping.wait(0.02):
            with service.database.transaction() as session:
                held = claim(session, worker_id="w", device_class=DeviceClass.CPU, lease_seconds=600)
            if held is None:
                continue
            if isinstance(ends, Report):
                service.succeed_with(held, {"compressed-tensors": {"config.json": b"{}"}}, ends)
                continue
            with service.database.transaction() as session:
                told = result(40, 0.5) if isinstance(ends, RequirementMissed) else None
                AttemptWriter(session, held.job_id, held.attempt).fail(ends, report=told)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The request, a baseline, and the places of summary and JUnit."""
    places = {name: tmp_path / name for name in ("request.yaml", "baseline.json", "summary.md", "junit.xml")}
    places["request.yaml"].write_text(yaml.safe_dump(REQUEST))
    places["baseline.json"].write_text(result(40, 0.1).model_dump_json())
    return places


def cases(path: Path) -> dict[str, list[str]]:
    """Name of each test case -> kinds of its failures."""
    return {str(case.get("name")): [kind.tag for kind in case] for case in parse(path).getroot()}


def run(service: Service, files: dict[str, Path], *more: str, url: str | None = None) -> tuple[int, str, str]:
    """(exit code, standard output, summary) of a check."""
    outputs = ("--summary", str(files["summary.md"]), "--junit", str(files["junit.xml"]))
    where = ("--url", url or service.url, "--key", service.key)
    done = command("check", str(files["request.yaml"]), *outputs, *more, *where)
    return done.returncode, done.stdout, files["summary.md"].read_text()


def test_a_result_as_good_as_the_baseline_passes(service: Service, files: dict[str, Path]) -> None:
    with a_worker(service, result(40, 0.104)):
        code, printed, summary = run(service, files, "--baseline", str(files["baseline.json"]))
    assert code == 0, summary
    assert printed.startswith("job_")
    assert "### Bitwright: passed" in summary
    assert "0.10400, +4.0% against 0.10000; at most +5.0% is allowed" in summary
    assert "kept: max_kl_divergence 0.3" in summary
    assert "| KL to the original | 0.10400 | 0.10000 |" in summary
    assert all(kinds == [] for kinds in cases(files["junit.xml"]).values())
    assert len(cases(files["junit.xml"])) == 4


def test_a_worse_result_is_missed_by_the_figure_that_is_worse(service: Service, files: dict[str, Path]) -> None:
    with a_worker(service, result(44, 0.1)):
        code, job, summary = run(service, files, "--baseline", str(files["baseline.json"]))
        assert code == 1
        assert "### Bitwright: not good enough" in summary
        assert cases(files["junit.xml"])["size against the baseline"] == ["failure"]
        assert cases(files["junit.xml"])["KL to the original against the baseline"] == []
        more = ("--baseline", job.strip(), "--idempotency-key", "again")
        assert run(service, files, *more)[0] == 0, "that job is the baseline now"
        assert run(service, files, *more, "--allow-size", "0")[0] == 0, "the same job is its own equal"


def test_a_missed_requirement_is_no_error_of_the_service(service: Service, files: dict[str, Path]) -> None:
    with a_worker(service, RequirementMissed("the KL divergence is 0.5, more than 0.3")):
        code, _, summary = run(service, files)
    assert code == 1
    assert "the KL divergence is 0.5, more than 0.3" in summary
    assert cases(files["junit.xml"]) == {"the request's requirements": ["failure"]}


def test_a_failed_job_tells_its_reason_and_way_out(service: Service, files: dict[str, Path]) -> None:
    with a_worker(service, NumericalFailure("block 3 has no inverse", hint="raise dampening")):
        code, _, summary = run(service, files, "--baseline", str(files["baseline.json"]))
    assert code == 1
    assert "### Bitwright: could not be checked" in summary
    assert "block 3 has no inverse (raise dampening)" in summary
    assert cases(files["junit.xml"])["the job succeeds"] == ["error"]


@pytest.mark.slow
def test_a_service_that_is_down_is_said_to_be_so(service: Service, files: dict[str, Path]) -> None:
    code, printed, summary = run(service, files, url=NOBODY)
    assert (code, printed) == (3, "")
    assert "could not be checked" in summary
    assert NOBODY in summary
    assert cases(files["junit.xml"]) == {"the service answers": ["error"]}


def test_what_is_wrong_before_there_is_a_job(service: Service, files: dict[str, Path]) -> None:
    code, printed, summary = run(service, files, "--baseline", "job_0123456789abcdefghjkmnpqrs")
    assert (code, printed) == (2, ""), "a baseline that is not there costs no job"
    files["request.yaml"].write_text("model: org/name\nmethod: rtn\nbits: 9\n")
    code, printed, summary = run(service, files)
    assert (code, printed) == (2, "")
    assert "bits" in summary


def test_a_figure_that_is_missing_is_no_pass() -> None:
    (kl, *_) = gates(0.05, 0.01, 0.01)
    without = Compared("old", report())
    assert against(kl, result(1, 0.1), without).outcome is Outcome.ERROR
    assert against(kl, report(), Compared("old", result(1, 0.1))).outcome is Outcome.ERROR
    assert against(kl, result(1, 0.0), Compared("old", result(1, 0.0))).outcome is Outcome.PASSED
    assert against(kl, result(1, 0.1), Compared("old", result(1, 0.0))).outcome is Outcome.MISSED


def test_nothing_in_a_detail_breaks_out_of_the_documents(tmp_path: Path) -> None:
    checks = [Check("a", Outcome.MISSED, "one | two\n<b>three</b>\x00"), Check("b", Outcome.ERROR, "]]>")]
    (line,) = [line for line in markdown("job", checks, []).splitlines() if "one" in line]
    assert line.count(" | ") == 2
    assert "<b>" not in line
    write_junit(tmp_path / "x.xml", junit("job", checks, 1.0))
    assert list(cases(tmp_path / "x.xml").values()) == [["failure"], ["error"]]
    assert verdict(checks) is Outcome.ERROR


Steps = Callable[[Mapping[str, str]], tuple[int, str, str]]


@pytest.fixture
def steps(tmp_path: Path, files: dict[str, Path]) -> Steps:
    """Runs all shell steps of the action with these inputs: (exit code, summary, output)."""
    action = yaml.safe_load(ACTION.read_text())
    defaults = {name: str(spec.get("default", "")) for name, spec in action["inputs"].items()}
    # Of the package that is installed here pip has nothing to bring.
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    installed = {"PATH": here, "PIP_NO_INDEX": "1"}
    outcome = {name: tmp_path / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}

    def run_all(inputs: Mapping[str, str]) -> tuple[int, str, str]:
        given = {**defaults, **inputs}
        assert set(given) == set(defaults), "an input that the action does not have"
        for step in action["runs"]["steps"]:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "a text of the caller's goes into a script by a variable alone"
            env = {name: expand(value, given) for name, value in step["env"].items()}
            ran = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
                env={**os.environ, **env, **{name: str(path) for name, path in outcome.items()}, **installed},
                cwd=tmp_path,
                check=False,
            )
            if ran.returncode:
                break
        summary, output = (path.read_text() if path.exists() else "" for path in outcome.values())
        return ran.returncode, summary, output

    return run_all


def expand(value: str, inputs: Mapping[str, str]) -> str:
    """An expression of the action with its inputs."""
    for name, text in inputs.items():
        value = value.replace("${{ inputs." + name + " }}", text)
    assert "${{" not in value
    return value


@pytest.mark.slow
def test_the_steps_of_the_action(service: Service, files: dict[str, Path], steps: Steps, tmp_path: Path) -> None:
    inputs = {
        "url": service.url,
        "key": service.key,
        "request": "request.yaml",
        "baseline": "baseline.json",
        "junit": "junit.xml",
    }
    with a_worker(service, result(40, 0.1)):
        code, summary, output = steps({**inputs, "idempotency-key": "first"})
    assert code == 0
    assert summary.count("### Bitwright: passed") == 1
    assert output.startswith("job=job_")
    with a_worker(service, result(40, 0.2)):
        code, summary, output = steps({**inputs, "idempotency-key": "second"})
        assert code == 1
        assert "### Bitwright: not good enough" in summary, "each run adds to the summary"
        code, *_ = steps({**inputs, "idempotency-key": "third", "arguments": "--allow-kl 1.5 --allow-size 0"})
        assert code == 0
    with a_worker(service, NumericalFailure("block 3 has no inverse")):
        code, summary, output = steps({**inputs, "idempotency-key": "fourth"})
    assert code == 1
    assert "block 3 has no inverse" in summary
    code, summary, output = steps({**inputs, "url": NOBODY, "idempotency-key": "fifth"})
    assert code == 3
    assert output.splitlines()[-1] == "job="
    assert "the service answers" in summary
