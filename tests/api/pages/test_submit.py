"""The submit form: its fields are the request's schemas, and its answer is the dry run's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.api.pages.form_fields import body_of, groups_of, labels_of, of_schema
from app.api.submission.hub_child import HubChild, KnownLooks
from app.domain.methods import METHODS, RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import HubModel
from app.hub.looks import Answer, Found, Question
from app.settings import Settings
from app.store.session import migrate
from bitwright.errors import InvalidRequest
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api, make_settings, run_api
from tests.api.pages.conftest import Html

FILLED = {"model": "org/model", "method": "rtn", "bits": "4"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder: Path = tmp_path_factory.mktemp("submit")
    url = f"sqlite:///{folder}/pages.db"
    migrate(url)
    yield from run_api(make_settings(folder, url))


@pytest.fixture(scope="module")
def browser(site: Api) -> TestClient:
    return site.visitor()


def jobs(site: Api) -> list[dict[str, object]]:
    return list(site.reader.get("/v1/jobs").json()["items"])


def test_the_form_submits_once(site: Api, browser: TestClient) -> None:
    before, once = len(jobs(site)), Html(browser.get("/submit").text).field("once")
    sent = {**FILLED, "once": once, "metadata": "commit=abc\nteam = x", "calibration.num_samples": "16", "merge": ""}
    answers = [browser.post("/submit", data=sent, follow_redirects=False) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["location"] == answers[1].headers["location"]
    made = jobs(site)
    assert len(made) == before + 1
    assert made[0]["metadata"] == {"commit": "abc", "team": "x"}
    request = site.reader.get("/v1" + answers[0].headers["location"]).json()["request"]
    assert request["calibration"]["num_samples"] == 16
    assert request["quantization"]["bits"] == 4


def test_a_dry_run_estimates_and_stores_nothing(site: Api, browser: TestClient) -> None:
    folder = site.settings.model_roots[0] / "tiny"
    write_checkpoint(folder)
    before = len(jobs(site))
    for action in ("typed", "check"):
        sent = {**FILLED, "model": str(folder), "group_size": "32", "action": action}
        shown = Html(browser.post("/submit", data=sent).text)
        assert "This would be accepted." in shown.text
        assert "bits per weight model" in shown.text
        assert shown.field("model") == str(folder)
    assert len(jobs(site)) == before


def test_problems_stand_at_their_inputs(browser: TestClient) -> None:
    sent = {**FILLED, "bits": "9", "require.max_kl_divergence": "-1", "calibration.num_samples": "many", "rest": "{"}
    shown = Html(browser.post("/submit", data={**sent, "action": "typed"}).text)
    assert "this is no JSON" in shown.text
    del sent["rest"]
    shown = Html(browser.post("/submit", data={**sent, "action": "typed"}).text)
    wrong = {attrs["id"] for tag, attrs in shown.elements if attrs.get("aria-invalid") == "true"}
    assert wrong == {"bits", "require.max_kl_divergence", "calibration.num_samples"}
    ids = shown.values("p", "id")
    assert {f"wrong-{name}" for name in wrong if name is not None} <= set(ids)
    refused = browser.post("/submit", data=sent)
    assert refused.status_code == 422
    assert "3 things are wrong" in Html(refused.text).text
    missing = Html(browser.post("/submit", data={**FILLED, "method": "qlora", "action": "check"}).text)
    assert "wrong-finetune.dataset" in missing.values("p", "id")


def test_everything_else_goes_as_json(browser: TestClient, site: Api) -> None:
    rest = '{"quantization": {"modules": {"ignore": ["*.down_proj"]}}, "calibration": {"sequence_length": 64}}'
    sent = {**FILLED, "calibration.num_samples": "8", "rest": rest, "formats": ["native", "gguf"]}
    answer = browser.post("/submit", data=sent, follow_redirects=False)
    assert answer.status_code == 303, Html(answer.text).text
    location = answer.headers["location"]
    request = site.reader.get("/v1" + location).json()["request"]
    assert request["quantization"]["modules"]["ignore"] == ["*.down_proj"]
    assert (request["calibration"]["num_samples"], request["calibration"]["sequence_length"]) == (8, 64)
    assert request["formats"] == ["native", "gguf"]


def test_another_method_has_other_fields(browser: TestClient) -> None:
    for method, own, other in (("signround", "scale_steps", "sweeps"), ("gptq", "sweeps", "scale_steps")):
        shown = Html(browser.post("/submit", data={**FILLED, "method": method, "action": "fields"}).text)
        names = {*shown.values("input", "name"), *shown.values("select", "name")}
        assert own in names
        assert other not in names


@pytest.mark.parametrize("method", [*METHODS, *RECIPES, *ADAPTER_RECIPES])
def test_defaults_typed_in_are_the_defaults(method: str) -> None:
    """What a field says of its default is what the service fills in: typed in, nothing changes."""
    fields = [field for group in groups_of(method, ()) for field in group.fields]
    names = [field.name for field in fields]
    assert len(names) == len(set(names))
    needed = {"model": ("org/model",), "method": (method,), "bits": ("4",)}
    trained = method in ADAPTER_RECIPES
    needed |= {"finetune.dataset": ("builtin",)} if trained else {}
    told = {
        field.name: (field.default,)
        for field in fields
        if field.default and field.name not in needed and "." not in field.name and field.name != "preset"
    }
    plain, typed = body_of(needed, fields), body_of({**told, **needed}, fields)
    assert JobRequest.parse(plain).model_dump(exclude={"quantization": {"learning_rate"}}) == JobRequest.parse(
        typed
    ).model_dump(exclude={"quantization": {"learning_rate"}})


def test_fields_are_those_of_the_schema() -> None:
    fields = {field.name: field for field in of_schema(METHODS["signround"].spec.model_json_schema())}
    assert (fields["bits"].kind, fields["bits"].least, fields["bits"].most) == ("integer", 2, 8)
    assert fields["symmetric"].choices == ("yes", "no")
    assert "nvfp4" in fields["scheme"].choices
    assert "at_most.kl" in fields
    assert "modules.ignore" not in fields


def test_labels_are_lines() -> None:
    assert labels_of("a=1\n\n b = c=d \nalone") == {"a": "1", "b": "c=d", "alone": ""}
    with pytest.raises(InvalidRequest):
        body_of({"rest": ("[1]",)}, [])


def test_typing_asks_the_hub_nothing(settings: Settings) -> None:
    child = HubChild(settings)
    model, other = HubModel(id="org/model"), HubModel(id="org/other")
    answer = Answer(number=1, found=Found(config={}, accepted=False, tensor_bytes=1, weights=1, tokenizer=True))

    def told(question: Question, deadline: float) -> Answer | None:
        return answer if question.id == "org/model" else None

    child._ask = told  # type: ignore[method-assign]
    assert child.known_only().look(model, any_type=False) is None
    assert child.look(model, any_type=False) == answer
    assert child.look(other, any_type=False) is None
    known = child.known_only()
    assert isinstance(known, KnownLooks)
    assert known.look(model, any_type=False) == answer
    assert known.look(model, any_type=True) is None
    assert known.look(other, any_type=False) is None
    assert child.pid is None
