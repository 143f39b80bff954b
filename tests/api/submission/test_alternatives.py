"""Alternatives of a dry run: estimated until a like job was measured, and better in what they say."""

from typing import Any

from app.store.attempts import AttemptWriter
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api
from tests.reports import QUALITY, report


def dry(api: Api, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    answer = api.client.post("/v1/jobs?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    return {one["why"]: one for one in answer.json()["alternatives"]}


def figures(told: list[dict[str, Any]], name: str) -> list[tuple[str, float]]:
    return [(one["basis"], one["value"]) for one in told if one["name"] == name]


def test_alternatives_are_estimated_or_measured(any_api: Api) -> None:
    folder = write_checkpoint(any_api.folder / "models" / "tiny", shards=True)
    text = {"num_samples": 8192, "sequence_length": 2048}
    body = {"model": str(folder), "method": "signround", "bits": 4, "group_size": 16, "calibration": text}
    found = dry(any_api, body)
    assert set(found) == {"smaller", "quicker", "nearer"}
    ((basis, smaller),) = figures(found["smaller"]["figures"], "bytes")
    ((_, asked),) = figures(found["smaller"]["asked_for"], "bytes")
    assert basis == "estimated"
    assert smaller < asked
    quick, slow = (figures(found["quicker"][name], "seconds") for name in ("figures", "asked_for"))
    assert all(mine[1] <= theirs[1] for mine, theirs in zip(quick, slow, strict=True))
    for one in found.values():
        assert any_api.client.post("/v1/jobs?dry_run=true", json=one["request"]).status_code == 200

    submitted = any_api.client.post("/v1/jobs", json=found["smaller"]["request"]).json()["id"]
    held = any_api.claim()
    told = report(quality=QUALITY, seconds={"total": 12.5}, plan={"device": "NVIDIA H200"})
    with any_api.database.transaction() as session:
        AttemptWriter(session, held.job_id, held.attempt).succeed(told, [])
    measured = dry(any_api, body)["smaller"]
    assert figures(measured["figures"], "kl") == [("measured", QUALITY.kl_divergence)]
    assert figures(measured["figures"], "seconds") == [("measured", 12.5)]
    assert {(one["device"], one["job_id"]) for one in measured["figures"]} == {("NVIDIA H200", submitted)}
    stranger = any_api.stranger.post("/v1/jobs?dry_run=true", json=body).json()["alternatives"]
    assert all(one["basis"] == "estimated" for other in stranger for one in other["figures"])


def test_a_model_that_nobody_saw_has_none(api: Api) -> None:
    assert dry(api, {"model": "org/model", "method": "signround", "bits": 4}) == {}
