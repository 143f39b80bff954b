"""A request of OpenAI's interface for a finetuning job, and the request of a job that it stands for.

    {"model": M, "training_file": F, "method": {"type": "supervised", "supervised": {"hyperparameters": {...}}},
     "bitwright": {"bits": 3}}
    {"model": M, "method": "qlora", "bits": 3, "finetune": {"dataset": F, ...}}

An epoch is exact: each row is a sequence of its own unless `bitwright` says otherwise, so that the rows of the file
and the batch's size give the steps.
"""

import re
from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from app.domain.adapters import ADAPTERS, LEARNING_RATE
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.base_job import START
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import MetadataKey, MetadataValue
from app.domain.request.problems import field_problems
from app.store.ids import id_pattern
from bitwright.errors import BitwrightError, FieldProblem, InvalidRequest, shorten
from bitwright.whole_numbers import with_whole_numbers

RECIPE: Mapping[str, object] = {"method": "qlora", "bits": 4}
"""Quantization of a request whose `bitwright` names none."""
EPOCHS = 3
"""Number of epochs for `auto`."""
HYPERPARAMETERS = "method.supervised.hyperparameters"
OWN_NAMES = ("model", "seed", "metadata", "base_job")
"""Fields of a job that the request has under OpenAI's names."""
RESULT = re.compile(rf"jobs/({START}[0-9a-z]+)")
"""`fine_tuned_model` of an earlier job."""

File = Annotated[str, StringConstraints(pattern=id_pattern("upl"))]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AskedHyperparameters(_Part):
    """Length and speed of the training."""

    n_epochs: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=1000)] = Field(
        default="auto", description=f"How often each row is learned; auto: {EPOCHS}."
    )
    batch_size: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=4096)] = Field(
        default="auto", description="Rows a step; auto: what a job without it has."
    )
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(strict=True, gt=0, le=1000)] = Field(
        default="auto", description="Of the learning rate that suits the adapter; auto: 1."
    )


class Supervised(_Part):
    """Supervised finetuning."""

    hyperparameters: AskedHyperparameters = AskedHyperparameters()


class Method(_Part):
    """The method: supervised alone."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised | None = None


class FineTuningRequest(_Part):
    """Body of POST /v1/fine_tuning/jobs."""

    model: str = Field(
        min_length=1,
        max_length=4096,
        description="Any model that a job takes: an id on the Hub, a path, an upload; or an earlier job's id or "
        "`fine_tuned_model`, whose training goes on.",
        examples=["HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    training_file: File = Field(description="Id of a file, or of an upload of one JSONL text.")
    validation_file: None = Field(
        default=None, description="Not taken: a share of the training file validates; see `finetune`."
    )
    method: Method | None = None
    hyperparameters: AskedHyperparameters | None = Field(
        default=None, description="The old place of `method.supervised.hyperparameters`."
    )
    suffix: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        default=None, description="Kept and shown. A name under `/hub` is `name` in `bitwright`."
    )
    seed: Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description="None is there.")
    bitwright: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of a job, as POST /v1/jobs takes them; they come before all that is chosen here. "
        "Without `method` and `quantization`, the recipe is qlora at 4 bits.",
        json_schema_extra={"maxProperties": 0},
    )

    @classmethod
    def parse(cls, body: object) -> Self:
        """The request of a decoded body.

        Raises:
            InvalidRequest: with every problem; what this service does not do is `unsupported_value`.
        """
        if not isinstance(body, Mapping):
            hint = 'send an object, e.g. {"model": "org/name", "training_file": "file-..."}'
            raise InvalidRequest("the body must be a JSON object", field="body", value=body, hint=hint)
        whole: Any = with_whole_numbers(body)
        if unsupported := unsupported_problems(whole):
            raise refusal(unsupported)
        try:
            return cls.model_validate(whole)
        except ValidationError as error:
            raise refusal(field_problems(error, cls, whole)) from None

    def asked(self) -> AskedHyperparameters:
        """The hyperparameters, wherever they stand."""
        supervised = None if self.method is None else self.method.supervised
        return self.hyperparameters or (supervised.hyperparameters if supervised else AskedHyperparameters())

    def kept(self) -> dict[str, Any]:
        """Parts that a job shows and cannot tell from its own request, as JSON."""
        given = {"model": self.model, "training_file": self.training_file, "suffix": self.suffix}
        return {**given, "hyperparameters": self.asked().model_dump(mode="json")}

    def steps(self, rows: int) -> int:
        """Steps of the optimizer for the epochs over a file of so many rows, those that validate left out."""
        own = self._finetune()
        share, size = (
            own.get(name, Finetune.model_fields[name].default) for name in ("validation_share", "batch_size")
        )
        size = own.get("batch_size", _number(self.asked().batch_size, size))
        if not isinstance(share, int | float) or not isinstance(size, int) or isinstance(size, bool) or size < 1:
            return 1  # the job's own check says what is wrong with them
        learned = max(1, round(rows * (1 - min(max(share, 0), 1))))
        return ceil(learned * _number(self.asked().n_epochs, EPOCHS) / size)

    @property
    def counts_rows(self) -> bool:
        """True if the steps are not given, so that the rows must be counted."""
        return "steps" not in self._finetune()

    def job_body(self, rows: int | None) -> dict[str, Any]:
        """The body of the job, in shorthand; `rows` of the training file, unless `counts_rows` is False."""
        own = {name: value for name, value in self.bitwright.items() if name != "finetune"}
        finetune: dict[str, Any] = {"dataset": self.training_file, "packing": False}
        if rows is not None:
            finetune["steps"] = self.steps(rows)
        if self.asked().batch_size != "auto":
            finetune["batch_size"] = self.asked().batch_size
        result = RESULT.fullmatch(self.model)
        model = self.model if result is None else result[1]
        goes_on = model.startswith(START)
        chosen = own.keys() & {"method", "quantization"}
        recipe = {} if chosen or goes_on else {name: own.get(name, value) for name, value in RECIPE.items()}
        body = {"model": model, **recipe, **own}
        if self.asked().learning_rate_multiplier != "auto":
            finetune["learning_rate"] = float(self.asked().learning_rate_multiplier) * _learning_rate(body)
        given = {"seed": self.seed, "metadata": self.metadata or None}
        given = {name: value for name, value in given.items() if value is not None}
        return {**body, **given, "finetune": {**finetune, **self._finetune()}}

    def _finetune(self) -> Mapping[str, Any]:
        own = self.bitwright.get("finetune", {})
        return own if isinstance(own, Mapping) else {}


def unsupported_problems(body: Mapping[str, Any]) -> list[FieldProblem]:
    """Parts of a body that OpenAI's service has and this one has not."""
    problems = []
    method = body.get("method")
    kind = method.get("type", "supervised") if isinstance(method, Mapping) else "supervised"
    if kind in ("dpo", "reinforcement"):
        detail = f"{kind} is not done here; method.type is supervised"
        problems.append(_unsupported("method.type", detail, kind))
    if body.get("integrations"):
        detail = "nothing is sent to other services; read GET /v1/fine_tuning/jobs/{id}/events, or let a webhook call"
        problems.append(_unsupported("integrations", detail, body["integrations"]))
    if body.get("validation_file") is not None:
        detail = "a share of the training file validates; leave this out, and set bitwright.finetune.validation_share"
        problems.append(_unsupported("validation_file", detail, body["validation_file"]))
    own = body.get("bitwright")
    finetune = own.get("finetune") if isinstance(own, Mapping) else None
    if finetune is not None and not isinstance(finetune, Mapping):
        detail = "must be an object of fields"
        problems.append(
            FieldProblem(field="bitwright.finetune", code="wrong_type", detail=detail, value=shorten(finetune))
        )
    named = [f"bitwright.{name}" for name in OWN_NAMES if isinstance(own, Mapping) and name in own]
    named += ["bitwright.finetune.dataset"] if isinstance(finetune, Mapping) and "dataset" in finetune else []
    problems += [
        _unsupported(name, "give it at the top of the request, as OpenAI's clients do", None) for name in named
    ]
    return problems


def refusal(problems: list[FieldProblem]) -> InvalidRequest:
    """One error for these problems."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidRequest(f"{problems[0].field}: {problems[0].detail}{more}", errors=tuple(problems))


def in_openais_names(error: BitwrightError) -> BitwrightError:
    """The error of a job's request, its fields named as the caller of this interface wrote them."""
    error.field = None if error.field is None else openais_name(error.field)
    error.errors = tuple(one.model_copy(update={"field": openais_name(one.field)}) for one in error.errors)
    return error


def openais_name(field: str) -> str:
    """The name of a job's field in a request of this interface."""
    if field.startswith("finetune.dataset"):
        return "training_file"
    known = {
        "finetune.steps": f"{HYPERPARAMETERS}.n_epochs",
        "finetune.batch_size": f"{HYPERPARAMETERS}.batch_size",
        "finetune.learning_rate": f"{HYPERPARAMETERS}.learning_rate_multiplier",
        "base_job": "model",
    }
    own = field.partition(".")[0] in ("model", "seed", "metadata", "body", "query", "header", "path")
    return known.get(field) or (field if own else f"bitwright.{field}")


def _unsupported(field: str, detail: str, value: object) -> FieldProblem:
    return FieldProblem(field=field, code="unsupported_value", detail=detail, value=shorten(value))


def _number(asked: Literal["auto"] | int, auto: int) -> int:
    return auto if asked == "auto" else int(asked)


def _learning_rate(body: Mapping[str, Any]) -> float:
    """The learning rate that a job of this body has where it names none."""
    method, adapter = body.get("method"), body.get("adapter")
    recipe = ADAPTER_RECIPES.get(method) if isinstance(method, str) else None
    given = adapter.get("kind") if isinstance(adapter, Mapping) else None
    info = ADAPTERS.get(str(recipe.kind if recipe else given or "lora"))
    return LEARNING_RATE if info is None else info.learning_rate
