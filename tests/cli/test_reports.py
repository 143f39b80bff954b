"""`bitwright report` saves a job's page, `bitwright compare` puts reports side by side."""

import json
from pathlib import Path

import pytest

from bitwright.cli.comparison import Compared, doubts, figure_rows, settings_rows, unbeaten
from bitwright.report import Figures, Report
from tests.bitwright.service import Service
from tests.cli.processes import command
from tests.cli.terminal import on_terminal
from tests.reports import QUALITY, report

PAGE = b"<!DOCTYPE html><title>made by the job</title>"


def result(bytes_: int, kl: float, **changed: object) -> Report:
    """A report of this size and distance."""
    size = report().size.model_copy(update={"bytes_quantized": bytes_, "bytes_files": {"gguf": bytes_ + 1}})
    return report(size=size, quality=QUALITY.model_copy(update={"kl_divergence": kl}), **changed)


def flags(service: Service) -> tuple[str, ...]:
    return ("--url", service.url, "--key", service.key)


def done(service: Service, told: Report, *, page: bool = True) -> str:
    files = {"model.safetensors": b"w", **({"report.html": PAGE} if page else {})}
    return service.finished({"model": "org/name", "method": "rtn"}, {"gguf": files, "native": {"w": b"n"}}, told)


def test_report_saves_the_page_and_prints_where(service: Service, tmp_path: Path) -> None:
    job_id = done(service, report())
    target = tmp_path / "new" / "page.html"
    ran = command("report", job_id, "--output", str(target), *flags(service))
    assert (ran.returncode, ran.stdout) == (0, f"{target}\n"), ran.stderr
    assert target.read_bytes() == PAGE
    assert [file.name for file in target.parent.iterdir()] == ["page.html"]


def test_report_says_where_there_is_none(service: Service, tmp_path: Path) -> None:
    older, target = done(service, report(), page=False), ("--output", str(tmp_path / "page.html"))
    ran = command("report", older, *target, *flags(service))
    assert ran.returncode == 2
    assert f"`bitwright show {older}`" in ran.stderr
    ran = command("report", older, "--format", "mlx", *target, *flags(service))
    assert "it has: gguf, native" in ran.stderr
    with service.client() as client:
        queued = client.submit({"model": "org/name", "method": "rtn"}).id
    ran = command("report", queued, *target, *flags(service))
    assert f"job {queued} is queued" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_compare_of_jobs_and_folders(service: Service, tmp_path: Path) -> None:
    job_id = done(service, result(40, 0.1, method="gptq"))
    (tmp_path / "report.json").write_text(result(50, 0.2).model_dump_json())
    ran = command("compare", job_id, str(tmp_path), *flags(service))
    assert ran.returncode == 0, ran.stderr
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in ran.stdout.splitlines()}
    assert rows[""] == [job_id, str(tmp_path)]
    assert rows["method"] == ["gptq", "rtn"]
    assert rows["size"] == ["40 B", "50 B"]
    assert rows["weight files of gguf"] == ["41 B", "51 B"]
    assert rows["KL to the original"] == ["0.10000", "0.20000"]
    told = json.loads(command("compare", job_id, str(tmp_path / "report.json"), "--json", *flags(service)).stdout)
    assert told["unbeaten"] == [job_id]
    assert told["best"]["size"] == job_id
    assert told["doubts"] == []
    code, shown = on_terminal("compare", job_id, str(tmp_path), *flags(service))
    assert code == 0
    assert "not beaten by another" in shown


def test_folders_alone_need_no_service(tmp_path: Path) -> None:
    for name, kl in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(result(4, kl).model_dump_json())
    ran = command("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--url", "http://127.0.0.1:9", "--key", "none")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{}", "is no report of Bitwright")])
def test_compare_refuses_what_is_no_report(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    ran = command("compare", str(tmp_path), str(tmp_path))
    assert ran.returncode == 2
    assert said in ran.stderr
    assert "nothing to be compared with" in command("compare", str(tmp_path)).stderr


def test_rows_tell_what_differs_and_which_is_best() -> None:
    results = [Compared("a", result(40, 0.3)), Compared("b", result(50, 0.1, seed=7)), Compared("c", report())]
    assert {row.name for row in settings_rows(results) if row.differs} == {"seed"}
    best = {row.name: row.best for row in figure_rows(results)}
    assert (best["size"], best["KL to the original"], best["weight files of gguf"]) == (2, 1, 0)
    assert best["size of the original"] is None
    assert best["perplexity"] is None  # both that have one have the same
    assert doubts(results) == ["not all were evaluated"]


def test_other_texts_and_models_are_told() -> None:
    other = QUALITY.model_copy(update={"text": QUALITY.text.model_copy(update={"sha256": "1" * 64})})
    model = report().model.model_copy(update={"source": "org/other"})
    reference = Figures(perplexity=1, kl_divergence=1, top1_agreement=1)
    results = [
        Compared("a", report(quality=QUALITY)),
        Compared("b", report(quality=other, model=model, round_to_nearest=reference)),
    ]
    assert [doubt.split(":")[0] for doubt in doubts(results)] == [
        "quality was measured on different texts",
        "the results are of different models",
    ]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), None, (4.0, 1.0), (1.0, 3.0)]
    assert unbeaten(points) == [1, 6, 2, 0]
    assert unbeaten([None]) == []
