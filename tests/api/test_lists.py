"""Pages of jobs: each job looks as it does by itself, however often its page was asked for before it changed."""

from typing import Any

from app.api.lists.written_jobs import WrittenJobs
from app.store.jobs import JobRepository
from bitwright.errors import NumericalFailure
from bitwright.events import ProgressEvent
from tests.api.conftest import Api


def listed(api: Api, **query: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = api.client.get("/v1/jobs", params=query).json()["items"]
    return items


def assert_as_single(api: Api, ids: list[str]) -> None:
    """A page has these jobs, newest first, and each as GET of it tells."""
    items = listed(api)
    assert [item["id"] for item in items] == ids[::-1]
    for item in items:
        alone = api.client.get(f"/v1/jobs/{item['id']}").json()
        assert item == alone | {"attempts": [], "report": None, "queue": item["queue"]}
        assert item.keys() == alone.keys()
        assert (item["queue"] is not None) == (item["status"] == "queued" and not item["held"])


def test_a_page_shows_every_change_of_its_jobs(any_api: Api) -> None:
    api = any_api
    ids = [api.submit(metadata={"commit": f'"queue":null,{number}'}, seed=number) for number in range(5)]
    assert_as_single(api, ids)
    assert [item["queue"]["position"] for item in listed(api)] == [5, 4, 3, 2, 1]
    held = api.claim()
    assert_as_single(api, ids)
    for done in (1, 2):
        api.tell(held, ProgressEvent(stage="quantize", done=done, total=4, unit="blocks"))
        assert_as_single(api, ids)
    assert api.client.post(f"/v1/jobs/{ids[1]}/pause").status_code == 202
    assert_as_single(api, ids)
    assert api.client.post(f"/v1/jobs/{ids[1]}/resume").status_code == 202
    assert api.client.post(f"/v1/jobs/{ids[2]}/cancel").status_code == 202
    assert_as_single(api, ids)
    assert api.client.post(f"/v1/jobs/{held.job_id}/cancel").status_code == 202
    assert_as_single(api, ids)
    api.succeed(held)
    api.fail(api.claim(), NumericalFailure("no number"))
    assert_as_single(api, ids)
    assert api.client.delete(f"/v1/jobs/{held.job_id}").status_code == 204
    assert_as_single(api, [job_id for job_id in ids if job_id != held.job_id])


def test_of_many_jobs_the_latest_lists_are_kept(any_api: Api) -> None:
    ids = [any_api.submit(seed=number) for number in range(5)]
    written = WrittenJobs(most=3)
    with any_api.database.reading() as session:
        repository = JobRepository(session, any_api.tenant_id)
        page = repository.listed(after=None, limit=9).items
        assert [job.id for job in page] == ids[::-1]
        for job in page:
            assert written.of([job]) == {}
            texts = written.write([job], repository.listed_jobs([job.id]))
            assert written.of([job]) == texts
        assert list(written.of(page)) == ids[2::-1]
