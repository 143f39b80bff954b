"""The dashboard as a person uses it, in order: log in, submit, watch, read the report, compare, download."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import NARROW, WIDE, Site, violations

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

FAST = {"group_size": 32, "calibration": {"num_samples": 4, "sequence_length": 64}}
SMALL = {"evaluation": {"num_samples": 2, "sequence_length": 64}}


def log_in(site: Site) -> None:
    site.open("/")
    site.page.fill("#key", site.key)
    site.page.get_by_role("button", name="Log in").click()
    site.page.wait_for_url(f"{site.service.url}/")


def submitted(site: Site, model: Path) -> str:
    """The id of a job that was submitted through the form, with a slip on the way that the dry run shows."""
    page = site.page
    page.get_by_role("link", name="Submit a job").click()
    page.fill("#model", str(model))
    page.select_option("#method", "gptq")
    page.wait_for_selector("#sweeps", state="attached")  # the fields of that method
    assert page.input_value("#model") == str(model)
    page.fill("#bits", "9")
    page.fill("#group_size", "32")
    page.wait_for_selector("#wrong-bits")
    assert page.get_attribute("#bits", "aria-invalid") == "true"
    page.fill("#bits", "4")
    page.get_by_text("Calibration text").click()
    page.fill("[id='calibration.num_samples']", "4")
    page.fill("[id='calibration.sequence_length']", "64")
    page.get_by_text("Evaluation text").click()
    page.fill("[id='evaluation.num_samples']", "2")
    page.fill("[id='evaluation.sequence_length']", "64")
    page.wait_for_selector("text=This would be accepted.")
    assert page.locator("#wrong-bits").count() == 0
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/jobs/job_*")
    return str(page.url.rpartition("/")[2])


def test_a_visit(chromium: Any, site: Site, tiny_model: Path, tmp_path: Path) -> None:
    page = site.page
    site.open("/login")
    assert violations(page) == []
    log_in(site)
    assert page.locator("text=There is no job yet.").count() == 1
    with site.service.client() as client:
        others = [
            client.submit({"model": str(tiny_model), "method": "rtn", "bits": bits, **FAST, **SMALL}).id
            for bits in (2, 8)
        ]
        job_id = submitted(site, tiny_model)
        seen = set[str]()
        while page.locator(".status.succeeded").count() == 0:  # the page goes on by itself
            seen.add(page.locator(".head .status").inner_text())
            page.wait_for_timeout(200)
            assert page.locator(".status.failed").count() == 0, page.locator("main").inner_text()
        assert seen & {"queued", "running"}
        for other in others:
            assert client.wait(other).status.value == "succeeded"
    page.wait_for_selector(".uplot canvas")
    see_report(site, job_id)
    report_from_disk(chromium, site, job_id, tmp_path)
    download(site, job_id)
    compare(site, [job_id, *others])
    looks(site, job_id, [job_id, *others])
    keys(site)
    keyboard(site)
    assert site.complaints == []
    log_out(site, job_id)


def see_report(site: Site, job_id: str) -> None:
    """The report in its frame: it is there, and its origin is none of ours."""
    page = site.page
    page.locator("iframe.report").scroll_into_view_if_needed()
    frame = page.frame_locator("iframe.report")
    frame.locator("#quality").wait_for()
    assert frame.locator("svg[role=img]").count() >= 3
    inner = next(one for one in page.frames if one.url.endswith("/report"))
    assert inner.evaluate("self.origin") == "null"
    with site.service.client() as client:
        report = client.job(job_id).report
    assert report is not None
    assert report.quality is not None
    told = frame.locator("data[data-at='/quality/perplexity']").first.get_attribute("value")
    assert float(str(told)) == report.quality.perplexity


def report_from_disk(chromium: Any, site: Site, job_id: str, folder: Path) -> None:
    """The report as a file, in a browser without a network: it asks for nothing, and axe finds nothing."""
    with site.service.client() as client:
        pages = [one for one in client.artifacts(job_id) if one.path == "report.html"]
        file = client.download_artifact(pages[0], folder)
    # axe is a script, which the page's own policy would not let run.
    context = chromium.new_context(offline=True, bypass_csp=True)
    page, asked = context.new_page(), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    for scheme, size in (("light", WIDE), ("dark", NARROW)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(size)
        page.goto(file.as_uri())
        assert violations(page) == [], (scheme, size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert asked == [file.as_uri()] * 2
    context.close()


def download(site: Site, job_id: str) -> None:
    """One file and a whole checkpoint, as they are stored."""
    page = site.page
    with site.service.client() as client:
        artifacts = client.artifacts(job_id)
    card = next(one for one in artifacts if one.path == "README.md" and one.format != "native")
    with page.expect_download() as started:
        page.locator(f"a[href$='/files/{card.id}']").click()
    assert Path(started.value.path()).stat().st_size == card.size
    with page.expect_download() as started:
        page.locator("text=as one tar").first.click()
    with tarfile.open(fileobj=io.BytesIO(Path(started.value.path()).read_bytes())) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "report.html", "report.json"} <= names


def compare(site: Site, jobs: list[str]) -> None:
    """Three jobs, ticked on the list."""
    page = site.page
    site.open("/")
    for job_id in jobs:
        page.check(f"#tick-{job_id}")
    page.get_by_role("button", name="Compare the ticked jobs").click()
    page.wait_for_selector("table.compared")
    assert page.locator("table.compared thead th").count() == 3
    assert page.locator(".uplot canvas").count() == 2
    best = page.locator("tr:has(th:text-is('size')) td.best").inner_text()
    assert "best" in best


def looks(site: Site, job_id: str, jobs: list[str]) -> None:
    """Every page, light and dark, wide and narrow: axe finds nothing, and nothing is wider than the screen."""
    page = site.page
    paths = ["/", f"/jobs/{job_id}", "/submit", f"/compare?jobs={'+'.join(jobs)}", "/compare"]
    paths += ["/models", "/workers", "/catalogue", "/usage", "/keys"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size in (WIDE, NARROW):
            page.set_viewport_size(size)
            for path in paths:
                site.open(path)
                page.wait_for_load_state("networkidle")
                assert violations(page) == [], (scheme, size, path)
                assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], (size, path)
    page.set_viewport_size(WIDE)


def keys(site: Site) -> None:
    """A key is made and revoked on its page; axe finds nothing where its text is shown."""
    page = site.page
    site.open("/keys")
    page.get_by_label("Name").fill("for a program")
    page.get_by_label("Days that it is valid").fill("30")
    page.get_by_role("button", name="Make the key").click()
    page.wait_for_selector("[role=status] code")
    assert page.locator("[role=status] code").inner_text().startswith("bw_")
    assert violations(page) == []
    page.get_by_role("button", name="Revoke for a program").click()
    page.wait_for_selector("td:has-text('revoked')")


def keyboard(site: Site) -> None:
    """Without a mouse: past the navigation, to the first job."""
    page: Any = site.page
    site.open("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("(document.activeElement.getAttribute('href') || '').includes('/jobs/job_')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/job_*")


def log_out(site: Site, job_id: str) -> None:
    """The session is over, and so are its pages."""
    page = site.page
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
    page.goto(f"{site.service.url}/jobs/{job_id}")
    assert "/login" in page.url
