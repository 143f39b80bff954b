"""A job that starts from a base job's result: what its request takes over, and what must be the same.

    {"base_job": "job_...", "finetune": {"dataset": D}}
    {"model": "job_...", "finetune": {"dataset": D}}           the same: the base job is the model

Model, quantization and calibration are those of the base job, since its codes are; where the request names them all
the same, it must name them alike. An adapter that the base job trained and did not fold into the weights goes on
from its values, so kind and shape are given with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from app.domain.methods import METHODS, RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES, expand_recipe
from app.domain.request.problems import as_written
from app.domain.request.sources import CalibrationSource, ModelSource, expand_source
from bitwright.errors import FieldProblem, shorten
from bitwright.request import ADAPTER_SHORTHAND

JOB_ID = r"^job_[0-9a-z]+$"
START = "job_"

Folded = Literal["offsets", "zero_points"]
"""Place of an adapter that lies in the weights: an offset per group, or its integer zero point."""

CHANGEABLE = frozenset({"dropout"})
"""Fields of an adapter that do not belong to its shape."""

DESCRIPTION = "bitwright.json"
REPORT = "report.json"
ADAPTER_FILE = "adapter.safetensors"
INPUTS = "inputs.safetensors"
"""In a native checkpoint: sums of the original linears' squared inputs over calibration text."""

_OF_METHODS = frozenset(field for info in METHODS.values() for field in info.spec.model_fields)
_MODEL: TypeAdapter[Any] = TypeAdapter(ModelSource)
_TEXT: TypeAdapter[Any] = TypeAdapter(CalibrationSource)


@dataclass(frozen=True)
class BaseJob:
    """A job that has succeeded, as another one starts from it.

    request    its full form, as JSON
    revision   commit of its model, where that is on the Hub
    folded     what holds the adapter that lies in its weights; None: none does
    """

    id: str
    request: Mapping[str, Any]
    revision: str | None = None
    folded: Folded | None = None

    @property
    def model(self) -> dict[str, Any]:
        """Its model; a branch of the Hub is pinned to the commit that was quantized."""
        model = dict(self.request["model"])
        return model | {"revision": self.revision} if model["source"] == "hub" and self.revision else model

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """The adapter whose training goes on; None where there is none apart from the weights."""
        return continued_adapter(self.request)


def continued_adapter(request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The adapter that a job of this request, full form as JSON, keeps apart from its quantized weights."""
    adapter: Mapping[str, Any] | None = request.get("adapter")
    return None if request.get("merge") == "quantized" else adapter


def is_read(request: Mapping[str, Any], checkpoint: str, path: str, *, exports: bool = False) -> bool:
    """True if a job that starts from one of this request reads this file of that checkpoint.

    exports   whether it makes other formats of the native checkpoint: it reads all of that, and nothing else

    The native checkpoint has the weights, a LoRA's factors among them; other adapters are in their own file alone.
    """
    if exports:
        return checkpoint == "native"
    if checkpoint == "native":
        weights = path.startswith("weights") and path.endswith(".safetensors")
        return weights or path in (DESCRIPTION, REPORT)
    adapter = continued_adapter(request)
    apart = adapter is not None and adapter["kind"] != "lora"
    return apart and (checkpoint, path) == ("adapter", ADAPTER_FILE)


def named_job(body: Mapping[str, object]) -> str | None:
    """The id of the job that a body starts from, if it names one."""
    for job_id in (body.get("base_job"), body.get("model")):
        if isinstance(job_id, str) and job_id.startswith(START):
            return job_id
    return None


def start_from(body: dict[str, object], base_job: BaseJob | None) -> list[FieldProblem]:
    """Fills into `body` what it takes over; the problems that only this can see.

    Without `earlier`, which only a store can find, the body must say everything itself.
    """
    given = dict(body)
    problems = list(_name_job(body))
    if base_job is None:
        return problems
    problems += _take_model(body, base_job)
    problems += _take_quantization(body, base_job)
    problems += _take_calibration(body, base_job)
    problems += _take_adapter(body, base_job)
    return [problem.model_copy(update={"field": as_written(given, problem.field)}) for problem in problems]


def _name_job(body: dict[str, object]) -> Iterator[FieldProblem]:
    model, job = body.get("model"), body.get("base_job")
    if not isinstance(model, str) or not model.startswith(START):
        return
    del body["model"]
    if job is None:
        body["base_job"] = model
    elif job != model:
        yield _conflict("model", f"base_job names another job, {shorten(job)}; leave one of the two out", model)


def _take_model(body: dict[str, object], base_job: BaseJob) -> Iterator[FieldProblem]:
    given = body.get("model")
    try:
        meant = None if given is None else _MODEL.validate_python(expand_source(given))
    except ValidationError:
        return  # said by the validation of the whole
    body["model"] = base_job.model
    own = [_MODEL.validate_python(model) for model in (base_job.model, base_job.request["model"])]
    if meant is not None and meant not in own:
        detail = _differs(base_job, "model", shorten(own[0].model_dump(exclude={"source"})))
        yield _conflict("model", detail, given)


def _take_quantization(body: dict[str, object], base_job: BaseJob) -> Iterator[FieldProblem]:
    inner, own = body.get("quantization"), base_job.request["quantization"]
    if inner is not None and not isinstance(inner, Mapping):
        return
    named = body if inner is None else inner
    given = {field: value for field, value in named.items() if inner is not None or field in _OF_METHODS}
    name = given.pop("method", None)
    meant: Mapping[str, object] = {"method": name}
    if isinstance(name, str) and name in ADAPTER_RECIPES:
        yield from expand_recipe(body, name, ADAPTER_RECIPES[name])
        meant = {"method": ADAPTER_RECIPES[name].quantization["method"]}
        if inner is None:
            given = {field: value for field, value in given.items() if field not in ADAPTER_SHORTHAND}
    elif isinstance(name, str):
        meant = RECIPES.get(name, meant)
    if name is not None and meant["method"] != own["method"]:
        yield _of_quantization(base_job, "method", name)
    given |= {field: value for field, value in meant.items() if field != "method"}
    for field in given:
        if field in own and not _means_the_same(own, field, given[field]):
            yield _of_quantization(base_job, field, given[field])
    if inner is None:
        for field in _OF_METHODS & body.keys():
            del body[field]
    # What the method does not have stays, for the validation of the whole to refuse.
    body["quantization"] = {**given, **own}


def _means_the_same(own: Mapping[str, Any], field: str, value: object) -> bool:
    spec = METHODS[own["method"]].spec
    try:
        return spec.model_validate({**own, field: value}) == spec.model_validate(own)
    except ValidationError:
        return False


def _take_calibration(body: dict[str, object], base_job: BaseJob) -> Iterator[FieldProblem]:
    given, own = body.get("calibration"), base_job.request["calibration"]
    if given is not None and not isinstance(given, Mapping):
        return
    body["calibration"] = {**(given or {}), **own}
    for field, value in (given or {}).items():
        if field in own and _expanded_text(field, value) != own[field]:
            detail = f"nothing is calibrated: {_differs(base_job, field, shorten(own[field]))}"
            yield _conflict(f"calibration.{field}", detail, value)


def _expanded_text(field: object, value: object) -> object:
    if field != "dataset":
        return value
    try:
        return _TEXT.validate_python(expand_source(value)).model_dump(mode="json")
    except ValidationError:
        return value


def _take_adapter(body: dict[str, object], base_job: BaseJob) -> Iterator[FieldProblem]:
    own, given = base_job.adapter, body.get("adapter")
    if own is None or not isinstance(given, Mapping | None):
        return
    given = given or {}
    kind = given.get("kind", own["kind"])
    if kind != own["kind"]:
        detail = (
            f"{base_job.id} has trained a {own['kind']}, and only that goes on; leave adapter out, or train a "
            f"{shorten(kind)} {_elsewhere(base_job)}"
        )
        yield _conflict("adapter.kind", detail, kind)
        return
    body["adapter"] = {**own, **given}
    for field in own:
        if field not in CHANGEABLE and given.get(field, own[field]) != own[field]:
            detail = f"the adapter goes on from that of {base_job.id}, whose {field} is {own[field]}; leave {field} out"
            yield _conflict(f"adapter.{field}", detail, given[field])


def _elsewhere(base_job: BaseJob) -> str:
    """The way to start an adapter of another kind."""
    root = base_job.request.get("base_job")
    return f"from base_job {root}" if root else "without base_job: the same request and seed give the same codes"


def _of_quantization(base_job: BaseJob, field: str, value: object) -> FieldProblem:
    detail = _differs(base_job, field, shorten(base_job.request["quantization"].get(field)))
    if field == "method" and isinstance(value, str) and value in ADAPTER_RECIPES:
        detail += f'; for its adapter alone give "adapter": {{"kind": "{ADAPTER_RECIPES[value].kind}"}}'
    return _conflict(f"quantization.{field}", detail, value)


def _differs(base_job: BaseJob, field: object, own: object) -> str:
    kept = f"the job starts from {base_job.id}, whose {field} is {own}"
    return f"{kept}; leave it out; without base_job it is quantized anew"


def _conflict(field: str, detail: str, value: object) -> FieldProblem:
    return FieldProblem(field=field, code="conflicting_fields", detail=detail, value=shorten(value))
