"""Traces of requests that make jobs, on a real collector."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.store.models import Job
from tests.api.conftest import SHORTHAND, Api, make_settings, problem, run_api
from tests.otlp import Collector, collector

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def traced_api(folder: Path, database_url: str) -> Iterator[tuple[Api, Collector]]:
    with collector() as received:
        yield from ((api, received) for api in run_api(make_settings(folder, database_url, otlp_url=received.url)))


def test_a_job_has_its_place_in_the_trace_of_the_request_that_made_it(tmp_path: Path, sqlite_url: str) -> None:
    theirs = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    with traced_api(tmp_path, sqlite_url) as (api, received):
        made = api.client.post("/v1/jobs?dry_run=false", json=SHORTHAND, headers=theirs).json()["id"]
        alone = api.submit()
        quiet = api.client.post("/v1/jobs", json=SHORTHAND, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"}).json()[
            "id"
        ]
        problem(api.client.post("/v1/jobs", json={"method": "never-heard-of"}), 422, "invalid_request")
        api.client.get(f"/v1/jobs/{made}")
        with api.database.reading() as session:
            kept = {job_id: session.get_one(Job, job_id).traceparent for job_id in (made, alone, quiet)}
    spans = {span.attributes.get("bitwright.job_id"): span for span in received.spans}
    assert spans.keys() == {made, alone, None}, "one for each POST whose caller wants a trace; none for the look"
    assert (spans[made].trace_id, spans[made].parent_id) == (TRACE, SPAN)
    assert kept[made] == f"00-{TRACE}-{spans[made].span_id}-01"
    assert kept[alone] == f"00-{spans[alone].trace_id}-{spans[alone].span_id}-01"
    assert spans[alone].trace_id != TRACE
    assert str(kept[quiet]).endswith("-00"), "no worker tells of it, either"
    assert (spans[made].service, spans[made].name, spans[made].failed) == ("bitwright-api", "POST /v1/jobs", False)
    assert spans[None].attributes["http.response.status_code"] == 422
    sent = b"".join(received.bodies)
    for secret in (api.key, SHORTHAND["model"], "never-heard-of", "dry_run"):
        assert str(secret).encode() not in sent


def test_without_a_collector_no_job_has_one(api: Api) -> None:
    api.client.post("/v1/jobs", json=SHORTHAND, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert api.claim().traceparent is None
