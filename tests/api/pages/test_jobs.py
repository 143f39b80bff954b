"""The list of jobs, a job's page, its report and its files."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.pages.curves import MOST_POINTS, chart, of_events, of_report, thin
from app.api.pages.rendering import ASSETS
from app.report_page.page import POLICY
from app.store.attempts import AttemptWriter
from app.store.events import StoredEvent
from app.store.workers import register
from bitwright.errors import OutOfMemory
from bitwright.events import BlockEvent, LogEvent, MetricEvent, ProgressEvent, Stage, WarningEvent
from bitwright.job_states import DeviceClass
from bitwright.report import Report
from tests.api.conftest import Api, make_settings, run_api
from tests.api.pages.conftest import Html
from tests.report_page.reports import full, with_strings
from tests.report_page.test_page import HOSTILE, LITERALS

CARD = (
    "---\nx: 1\n---\n\n# t\n\n## Load\n\nWith `transformers`:\n\n```python\nload('<here>')\n```\n\n## Size\n\nsmall\n"
)
MARKUP = "<script>alert(1)</script>"
MOST_HTML, MOST_ASSETS = 100_000, 300_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API for all that only looks."""
    folder: Path = tmp_path_factory.mktemp("pages")
    from app.store.session import migrate

    url = f"sqlite:///{folder}/pages.db"
    migrate(url)
    yield from run_api(make_settings(folder, url))


def finish(api: Api, report: Report, files: dict[str, bytes] | None = None) -> str:
    """The id of a job that has succeeded with this report."""
    job_id = api.submit()
    held = api.claim()
    while held.job_id != job_id:
        held = api.claim()
    made = [api._store("compressed-tensors", path, content) for path, content in (files or {"w": b"w"}).items()]
    with api.database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(report, made)
    return job_id


@pytest.fixture(scope="module")
def finished(site: Api) -> str:
    files = {
        "README.md": CARD.encode(),
        "report.html": b"<!DOCTYPE html><title>as made</title>",
        "model.bin": b"w" * 99,
    }
    return finish(site, full(), files)


@pytest.fixture(scope="module")
def browser(site: Api) -> TestClient:
    return site.visitor()


def test_the_list_shows_and_filters(site: Api, finished: str, browser: TestClient) -> None:
    other = site.submit(method="gptq", metadata={"team": "search"})
    pages = {
        "/": {finished, other},
        "/?status=succeeded": {finished},
        "/?method=gptq": {other},
        "/?label=team%3Dsearch": {other},
        "/?model=org/model&status=queued": {other},
        "/?model=org/none": set[str](),
    }
    for path, wanted in pages.items():
        shown = Html(browser.get(path).text)
        assert {
            link.removeprefix("/jobs/") for link in shown.values("a", "href") if link.startswith("/jobs/")
        } >= wanted
        if path != "/":
            linked = {link for link in shown.values("a", "href") if link.startswith("/jobs/")}
            assert linked == {f"/jobs/{job_id}" for job_id in wanted}, path
    for path in ("/?status=odd", "/?label=team", "/?after=nothing", "/?page=2"):
        answer = browser.get(path)
        assert answer.status_code == 422, path
        assert Html(answer.text).open == []


def test_ticked_jobs_are_compared(site: Api, finished: str, browser: TestClient) -> None:
    smaller = full().size.model_copy(update={"bytes_quantized": 50_000_000})
    other = finish(site, full().model_copy(update={"size": smaller, "seed": 7}))
    sent = browser.post("/compare", data={"job": [finished, other]}, follow_redirects=False)
    assert sent.headers["location"] == f"/compare?jobs={finished}+{other}"
    shown = Html(browser.get(sent.headers["location"]).text)
    assert "50 MB" in shown.text
    charts = [json.loads(data) for data in shown.values("figure", "data-chart")]
    assert charts[0]["x"] == [50.0, 90.0]
    assert [one["name"] for one in charts[0]["series"]] == ["not beaten by another", "1: rtn", "2: rtn"]
    assert charts[0]["series"][1]["values"] == [None, full().quality.kl_divergence]  # type: ignore[union-attr]
    queued = site.submit()
    assert "Without a report" in browser.get(f"/compare?jobs={queued}").text
    assert browser.get("/compare?jobs=" + "+".join(f"job_{n}" for n in range(9))).status_code == 422


def test_a_running_job_shows_stages_curves_and_events(site: Api, browser: TestClient) -> None:
    job_id = site.submit(method="qlora", finetune={"dataset": "builtin"})
    held = site.claim()
    while held.job_id != job_id:
        held = site.claim()
    blocks = [BlockEvent(index=n, total=4, name=f"b{n}", loss_initial=0.2, loss=0.1 + n, seconds=1) for n in range(4)]
    losses = [MetricEvent(name="loss", value=3 - n / 10, step=n) for n in range(1, 6)]
    site.tell(held, *blocks, *losses, WarningEvent(code="short", message=f"short text {MARKUP}"))
    site.tell(held, LogEvent(event="parts_resumed", fields={"parts": 3}))
    site.tell(held, ProgressEvent(stage=Stage.FINETUNE, done=5, total=200, unit="steps", eta_seconds=34.0))
    answer = browser.get(f"/jobs/{job_id}")
    shown = Html(answer.text)
    assert "finetune 5/200 steps, 34.0 s left" in shown.text
    assert "quantize , done" in shown.text or "quantize, done" in shown.text
    assert "finetune, now" in shown.text
    assert "evaluate, next" in shown.text
    assert "parts resumed: parts 3" in shown.text
    assert MARKUP in shown.text
    assert MARKUP not in answer.text
    charts = [json.loads(data) for data in shown.values("figure", "data-chart")]
    assert charts[0]["series"][1] == {"name": "result", "values": [0.1, 1.1, 2.1, 3.1]}
    assert charts[1]["x"] == [1, 2, 3, 4, 5]
    assert "job" in shown.values("div", "data-live")
    assert browser.post(f"/jobs/{job_id}/cancel", follow_redirects=False).headers["location"] == f"/jobs/{job_id}"
    assert site.reader.get(f"/v1/jobs/{job_id}").json()["cancel_requested"] is True


def test_a_finished_job_shows_its_figures_files_and_load_lines(finished: str, browser: TestClient) -> None:
    shown = Html(browser.get(f"/jobs/{finished}").text)
    for told in ("12.346", "0.12346", "87.65 %", "load('<here>')", "With transformers:", "model.bin"):
        assert told in shown.text, told
    assert "small" not in shown.text, "the card's other sections are not the lines that load it"
    assert shown.values("div", "data-live") == []
    frame = next(attrs for tag, attrs in shown.elements if tag == "iframe")
    assert (frame["src"], frame["sandbox"]) == (f"/jobs/{finished}/report", None)


def test_files_are_attachments_for_the_visitor(site: Api, finished: str, browser: TestClient) -> None:
    shown = Html(browser.get(f"/jobs/{finished}").text)
    links = [link for link in shown.values("a", "href") if "/files/" in link]
    assert len(links) == 3
    for link in links:
        answer = browser.get(link)
        assert answer.status_code == 200
        assert answer.headers["content-disposition"].startswith("attachment")
        assert "script-src" not in answer.headers["content-security-policy"]
    archive = browser.get(f"/jobs/{finished}/archive?format=compressed-tensors")
    assert archive.headers["content-type"] == "application/x-tar"
    other = finish(site, full())
    assert browser.get(links[0].replace(finished, other)).status_code == 404


def test_the_report_is_the_jobs_own_page_without_our_origin(site: Api, finished: str, browser: TestClient) -> None:
    answer = browser.get(f"/jobs/{finished}/report")
    assert "as made" in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy == f"{POLICY}; sandbox; frame-ancestors 'self'"
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    older = finish(site, full())
    assert 'data-at="/quality/perplexity"' in browser.get(f"/jobs/{older}/report").text
    assert browser.get(f"/jobs/{site.submit()}/report").status_code == 409


def test_a_failed_job_says_why_and_can_be_tried_again_or_deleted(api: Api) -> None:
    browser, job_id = api.visitor(), api.submit()
    api.fail(api.claim(), OutOfMemory("too large <b>", hint="fewer sequences"))
    api.fail(api.claim(), OutOfMemory("too large <b>", hint="fewer sequences"))
    shown = Html(browser.get(f"/jobs/{job_id}").text)
    assert "out_of_memory too large <b> fewer sequences" in shown.text
    assert browser.post(f"/jobs/{job_id}/retry", follow_redirects=False).status_code == 303
    assert api.reader.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
    assert browser.post(f"/jobs/{job_id}/delete").status_code == 409
    browser.post(f"/jobs/{job_id}/cancel")
    assert browser.post(f"/jobs/{job_id}/delete", follow_redirects=False).headers["location"] == "/"
    assert browser.get(f"/jobs/{job_id}").status_code == 404


def test_nothing_hostile_lives_in_any_page(site: Api, browser: TestClient, tmp_path: Path) -> None:
    """Whatever a user or a model can write: names, labels, reports, files, events, errors, a worker's words."""

    def hostile(text: str) -> str:
        return text if text in LITERALS else text + HOSTILE

    document = with_strings(full().model_dump(mode="json"), hostile)
    for part in ("plan", "seconds"):
        document[part] |= {HOSTILE: 1.5}
    document["size"]["bytes_files"][HOSTILE] = 5
    quiet = HOSTILE.replace("\x00", "")
    (tmp_path / "m").mkdir()
    with site.database.transaction() as session:
        register(session, f"worker {quiet}", DeviceClass.CPU, {quiet: quiet, "runtimes": {quiet: quiet}})
    site.client.post("/v1/jobs", json={"model": "org/x", "method": "rtn", "metadata": {quiet[:60]: quiet}})
    held = site.claim()
    while held.job_id != site.reader.get("/v1/jobs").json()["items"][0]["id"]:
        held = site.claim()
    site.tell(held, WarningEvent(code="c", message=quiet), LogEvent(event=quiet, fields={quiet: quiet}))
    names = [f"{quiet.replace('/', '_')}.txt", "README.md"]
    card = f"## Load\n\n{HOSTILE}\n\n```python\n{HOSTILE}\n```\n".encode()
    made = [site._store("gguf", names[0], b"w"), site._store("gguf", names[1], b"\n" + card)]
    with site.database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(Report.model_validate(document), made)
    plain = Html(browser.get(f"/jobs/{finish(site, full())}").text)
    harmless = {tag for tag, _ in plain.elements} | {
        "progress",
        "strong",
        "textarea",
        "aside",
        "fieldset",
        "legend",
        "datalist",
    }
    paths = [f"/jobs/{held.job_id}", f"/jobs/{held.job_id}/report", f"/compare?jobs={held.job_id}", "/", "/workers"]
    for path in (
        *paths,
        "/submit?model=%3Cscript%3E",
        "/models",
        "/compare",
        "/?label=%3Cscript%3E%3D1",
        "/jobs/%3Cb%3E",
    ):
        answer = browser.get(path)
        shown = Html(answer.text)
        assert shown.open == [], path
        # An <img> of ours is the icon, a <script> of ours has an address.
        assert all(
            (found.get("src") or "").startswith("/assets/") for tag, found in shown.elements if tag in ("script", "img")
        )
        assert not any(name.startswith("on") for _, found in shown.elements for name in found), path
        if "/report" not in path:
            assert {tag for tag, _ in shown.elements} <= harmless | {
                "option",
                "select",
                "label",
                "h3",
                "tbody",
                "caption",
            }, path
        assert "\u202e" not in answer.text
    assert "alert(1)" in browser.get(paths[0]).text


def test_pages_are_small_and_their_assets_are_kept(site: Api, finished: str, browser: TestClient) -> None:
    seen = set[str]()
    for path in ("/", f"/jobs/{finished}", "/submit", f"/compare?jobs={finished}", "/models", "/catalogue", "/usage"):
        answer = browser.get(path)
        assert len(answer.content) <= MOST_HTML, path
        shown = Html(answer.text)
        seen |= {*shown.values("script", "src"), *shown.values("link", "href"), *shown.values("img", "src")}
        assert not any(attrs.get("style") for _, attrs in shown.elements), "the policy allows no style in the page"
    total = 0
    for link in seen:
        asset = site.anonymous.get(link)
        assert asset.status_code == 200, link
        assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert asset.headers["content-type"].split(";")[0] == ASSETS[link.rpartition("/")[2]]
        total += len(asset.content)
    assert len(seen) == len(ASSETS)
    assert total <= MOST_ASSETS
    link = min(seen)
    assert site.anonymous.get(re.sub("/[0-9a-f]{16}/", f"/{'0' * 16}/", link)).status_code == 404


def test_what_is_shipped_of_others_has_its_licence() -> None:
    from importlib.resources import files

    static = files("app.api.pages") / "static"
    assert "MIT License" in (static / "uPlot.LICENSE.txt").read_text()
    assert (static / "uPlot.iife.min.js").read_text().startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")


def test_behind_a_prefix_pages_link_under_it(tmp_path: Path, sqlite_url: str) -> None:
    from app.api.main import create_app
    from tests.api.conftest import BROWSER

    application = create_app(make_settings(tmp_path, sqlite_url))
    with TestClient(application, root_path="/bitwright", headers=BROWSER) as client:
        shown = Html(client.get("/bitwright/login").text)
        assert all(
            link.startswith("/bitwright/") for link in shown.values("link", "href") + shown.values("form", "action")
        )
        assert client.get("/bitwright/", follow_redirects=False).headers["location"] == "/bitwright/login"
        assert client.get("/bitwright/usage", follow_redirects=False).headers["location"].endswith("?next=%2Fusage")


def stored(*events: Any) -> list[StoredEvent]:
    from datetime import UTC, datetime

    return [StoredEvent("job", n, datetime.now(UTC), 1, event) for n, event in enumerate(events)]


def test_curves_of_a_repeated_attempt_show_what_was_told_last() -> None:
    block: Callable[[float], BlockEvent] = lambda loss: BlockEvent(index=0, total=1, name="b", loss=loss, seconds=1)  # noqa: E731
    (drawn,) = of_events(stored(block(2.0), block(1.0)))
    assert (drawn.x, drawn.series) == ((0,), {"result": (1.0,)})
    assert of_events(stored(MetricEvent(name="perplexity", value=3.0))) == []


def test_long_curves_are_thinned_to_their_ends() -> None:
    points = [(float(n), float(n)) for n in range(5000)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thin([]) == []
    assert chart("t", "x", "y", {"a": []}) is None


def test_curves_of_a_report_are_its_numbers() -> None:
    made = full()
    losses, errors, training = of_report(made)
    assert losses.series["result"] == tuple(float(f"{block.loss:.6g}") for block in made.blocks)
    assert errors.x == tuple(block.index for block in made.blocks)
    assert made.finetuning is not None
    steps = {point.step for point in made.finetuning.losses} | {point.step for point in made.finetuning.validations}
    assert training.x == tuple(sorted(steps))
