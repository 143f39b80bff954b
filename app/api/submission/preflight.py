"""Checks of a job before it is queued. A dry run shows their result; a real submission refuses the same things."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.api.submission.hub_child import Looks
from app.domain.advice import starved_calibration
from app.domain.estimates import estimate
from app.domain.fit import can_do_without_model, misfits, problem_of, refusal, warnings_of, without_model_problems
from app.domain.formats import FORMATS
from app.domain.inputs.foreign_files import foreign_files
from app.domain.inputs.inspection import CheckpointFiles, FolderFiles, Inspection
from app.domain.inputs.roots import ALLOWED_HINT, check_links, lies_under
from app.domain.request.job_request import JobRequest
from app.domain.request.source_walk import read_sources, with_source
from app.domain.request.sources import HubDataset, HubModel, LocalModel, LocalText, UploadedModel, UploadedText
from app.domain.runtimes import described, runtime_limits
from app.hub.looks import Answer
from app.inspection.inspector import Inspector
from app.inspection.lines import Verdict
from app.settings import Settings
from app.store.blobs import BlobStore
from app.store.models import Upload
from app.store.uploads import UploadRepository
from bitwright.errors import (
    BitwrightError,
    FieldProblem,
    InputError,
    InvalidDataset,
    NotFound,
    SourceForbidden,
    SourceNotFound,
)


@dataclass(frozen=True)
class UploadFiles:
    """The files of a complete upload, for inspection."""

    blobs: BlobStore
    files: Mapping[str, tuple[str, int]]
    """Name -> (sha256, size)."""

    def names(self) -> Sequence[str]:
        """All file names."""
        return sorted(self.files)

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return self.files[name][1]

    def read(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        with self.blobs.open(self.files[name][0], start) as file:
            return file.read(length)


@dataclass
class Preflight:
    """The request as it will be stored, and what was found out about it.

    not_checked   "hub" where the model is there and nobody has looked at it
    estimated     estimates of another request on the model, empty where it does not fit; None: nothing was seen of it
    training_bytes  of the text that finetunes, where this machine has it
    """

    request: JobRequest
    estimates: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[FieldProblem] = field(default_factory=list)
    not_checked: Literal["hub"] | None = None
    estimated: Callable[[JobRequest], Mapping[str, Any]] | None = None
    training_bytes: int | None = None

    def countable(self, request: JobRequest) -> JobRequest:
        """The request with steps in place of epochs, by which work can be estimated before its text is read."""
        finetune = request.finetune
        if finetune is None or finetune.epochs is None or self.training_bytes is None:
            return request
        return request.model_copy(update={"finetune": finetune.of_bytes(self.training_bytes)})

    def add(self, error: BitwrightError, path: str) -> None:
        """Note an error about the field at `path`."""
        self.problems.append(problem_of(error, path))


def look_at_hub(request: JobRequest, hub: Looks | None) -> Answer | None:
    """The Hub's answer about the request's model; None where that is elsewhere, the Hub is late, or not asked.

    It takes seconds at the worst, so no transaction may be open.
    """
    if hub is None or not isinstance(request.model, HubModel):
        return None
    return hub.look(request.model, any_type=can_do_without_model(request))


def find_sources(
    request: JobRequest, settings: Settings, uploads: UploadRepository, blobs: BlobStore
) -> tuple[Preflight, CheckpointFiles | None]:
    """The request with what it names looked up, and the model's files where this machine has them."""
    preflight = Preflight(request)
    model = _resolve_model(preflight, settings, uploads, blobs)
    _resolve_texts(preflight, settings, uploads)
    return preflight, model


def judge_model(
    preflight: Preflight,
    model: CheckpointFiles | None,
    inspector: Inspector,
    tenant: str,
    seen: Answer | None = None,
) -> None:
    """Look at the model: its files, in a limited child, or what the Hub said of it. Notes what is wrong, and refuses.

    It takes seconds at the worst, so no transaction may be open.

    seen   of a model on the Hub (`look_at_hub`)

    Raises:
        InputError: everything that is wrong is of one kind, e.g. group sizes that do not divide.
        InvalidRequest: several kinds of problems, all of them in `errors`.
        TooManyRequests: too many of the tenant's checkpoints wait to be looked at.
    """
    request = preflight.request
    looked = model is not None and _inspect(preflight, model, inspector, tenant)
    inspection = _seen(preflight, seen) if model is None else None
    if inspection is not None:
        preflight.problems += misfits(preflight.request, inspection)
        preflight.warnings += warnings_of(preflight.request, inspection)
        # Patterns and sizes that do not fit leave nothing to estimate.
        preflight.estimates = {} if preflight.problems else estimate(preflight.countable(request), inspection)
        preflight.estimated = lambda other: _estimated(inspection, preflight.countable(other))
    elif not looked and request.quantization.asks_for_weights_alone():
        preflight.problems += without_model_problems(request)
    starved = starved_calibration(preflight.request)
    preflight.warnings += [*([starved] if starved else []), *runtime_warnings(preflight.request)]
    preflight.warnings += _epochs_warnings(preflight)
    if preflight.problems:
        raise refusal(preflight.problems)


def _resolve_model(
    preflight: Preflight, settings: Settings, uploads: UploadRepository, blobs: BlobStore
) -> CheckpointFiles | None:
    """The checkpoint's files, where this machine has them; a local path is replaced by the real one."""
    model = preflight.request.model
    if isinstance(model, LocalModel):
        path = _resolve_path(preflight, model.path, settings, "model.path")
        if path is None:
            return None
        preflight.request = preflight.request.model_copy(update={"model": LocalModel(path=str(path))})
        if path.is_file():
            preflight.add(_file_as_model(model.path), "model.path")
        return _local_files(preflight, path, settings) if path.is_dir() else None
    if isinstance(model, UploadedModel):
        upload = _complete_upload(preflight, model.id, uploads, "model.id")
        return None if upload is None else UploadFiles(blobs, {f.name: (f.sha256, f.size) for f in upload.files})
    _check_hub(preflight, settings, "model")
    return None


def _file_as_model(path: str) -> InputError:
    """The refusal of a file as a model; names what the file is if its name shows that."""
    foreign = foreign_files([Path(path).name])
    if foreign is not None and not path.endswith(".safetensors"):
        return foreign.refusal("model.path")
    hint = "name the folder that holds config.json and the safetensors, or one GGUF file"
    return SourceNotFound("this is a file, and a model is a folder", value=path, hint=hint)


def _local_files(preflight: Preflight, folder: Path, settings: Settings) -> CheckpointFiles | None:
    try:
        check_links(folder, settings.model_roots)
    except SourceForbidden as error:
        preflight.add(error, "model.path")
        return None
    return FolderFiles(folder)


def _resolve_texts(preflight: Preflight, settings: Settings, uploads: UploadRepository) -> None:
    """Look at every text that the job reads; a local one is replaced by its real path."""
    for named in read_sources(preflight.request):
        dataset, where = named.source, named.field
        if isinstance(dataset, LocalText):
            path = _resolve_path(preflight, dataset.path, settings, f"{where}.path")
            if path is not None:
                preflight.request = with_source(preflight.request, where, LocalText(path=str(path)))
                _note_bytes(preflight, where, path.stat().st_size if path.is_file() else None)
                if path.is_dir():
                    hint = "name the JSONL file in it"
                    error = InvalidDataset("this is a folder, and a dataset is a file", value=dataset.path, hint=hint)
                    preflight.add(error, f"{where}.path")
        elif isinstance(dataset, UploadedText):
            upload = _complete_upload(preflight, dataset.id, uploads, f"{where}.id")
            if upload is not None and not is_text_upload(upload):
                hint = "begin an upload of one file named *.jsonl"
                error = InvalidDataset("the upload is not one .jsonl file", value=dataset.id, hint=hint)
                preflight.add(error, f"{where}.id")
            _note_bytes(preflight, where, None if upload is None else sum(file.size for file in upload.files))
        elif isinstance(dataset, HubDataset):
            _check_hub(preflight, settings, where)


def _note_bytes(preflight: Preflight, where: str, size: int | None) -> None:
    if where == "finetune.dataset":
        preflight.training_bytes = size


def _epochs_warnings(preflight: Preflight) -> list[str]:
    """A warning with the grounds of an estimate of epochs; none where steps were asked for."""
    asked, counted = preflight.request.finetune, preflight.countable(preflight.request).finetune
    if asked is None or counted is None or asked.epochs is None:
        return []
    if counted.epochs is not None:
        known = f"the estimate is of {asked.steps} steps: how many {asked.epochs:g} are is known when the text is read"
    else:
        known = f"{asked.epochs:g} are about {counted.steps} steps, by the {preflight.training_bytes} bytes of the text"
    return [f"finetune.epochs: {known}"]


def is_text_upload(upload: Upload) -> bool:
    """True if the upload is a text: one JSONL file."""
    return len(upload.files) == 1 and upload.files[0].name.endswith(".jsonl")


def _resolve_path(preflight: Preflight, given: str, settings: Settings, path: str) -> Path | None:
    """The real path, links followed; None with a problem noted if it is not one that may be read."""
    roots = settings.model_roots
    expanded = Path(given).expanduser() if given.startswith("~/") else Path(given)
    if not expanded.is_absolute():
        detail = "a local path must be absolute: the service has another working folder"
        hint = "give the whole path; or send the files with `bitwright upload` and name the id that it prints"
        preflight.add(SourceForbidden(detail, value=given, hint=hint), path)
        return None
    if not lies_under(expanded, roots):
        preflight.add(
            SourceForbidden(f"{given} is outside the folders that may be read", value=given, hint=ALLOWED_HINT), path
        )
        return None
    real = Path(os.path.realpath(expanded))
    if not os.path.exists(real):  # Path.exists raises for a name that is too long
        if any(root.is_dir() and real.is_relative_to(os.path.realpath(root)) for root in roots):
            preflight.add(SourceNotFound(f"there is nothing at {given}", value=given, hint="check the path"), path)
            return None
        preflight.warnings.append(f"{path}: {given} is not on the API's machine; the worker will look for it")
    return real


def _complete_upload(preflight: Preflight, upload_id: str, uploads: UploadRepository, path: str) -> Upload | None:
    try:
        upload = uploads.get(upload_id)
    except NotFound as error:
        preflight.add(SourceNotFound(error.detail, value=upload_id, hint="POST /v1/uploads makes one"), path)
        return None
    if not upload.complete:
        hint = f"send its files, then POST /v1/uploads/{upload_id}/complete"
        preflight.add(SourceNotFound("the upload is not complete", value=upload_id, hint=hint), path)
        return None
    return upload


def _check_hub(preflight: Preflight, settings: Settings, path: str) -> None:
    if not settings.hub_enabled:
        hint = "use a local path, an upload, or builtin text"
        preflight.add(SourceForbidden("this service does not fetch from the Hub", hint=hint), path)


def _inspect(preflight: Preflight, files: CheckpointFiles, inspector: Inspector, tenant: str) -> bool:
    """Note the verdict on a checkpoint; False if there is none but what is wrong with it."""
    try:
        verdict = inspector.look(tenant, preflight.countable(preflight.request), files)
    except InputError as error:
        preflight.add(error, "model")
        return False
    except OSError as error:
        hint = "let the user that the service runs as read the folder and its files"
        words = error.strerror or str(error)
        preflight.add(SourceForbidden(f"the checkpoint cannot be read: {words}", hint=hint), "model")
        return False
    refused = None if verdict.error is None else verdict.error.exception()
    if isinstance(refused, InputError):
        preflight.add(refused, "model")
        return False
    if refused is not None:
        raise refused
    preflight.problems += verdict.problems
    preflight.warnings += verdict.warnings
    preflight.estimates = {} if preflight.problems else verdict.estimates
    preflight.estimated = lambda other: _fitting(inspector.look(tenant, preflight.countable(other), files))
    return True


def _fitting(verdict: Verdict) -> Mapping[str, Any]:
    return {} if verdict.error is not None or verdict.problems else verdict.estimates


def _estimated(inspection: Inspection, request: JobRequest) -> Mapping[str, Any]:
    return {} if misfits(request, inspection) else estimate(request, inspection)


def _seen(preflight: Preflight, seen: Answer | None) -> Inspection | None:
    """A model on the Hub as it was seen there; what only the Hub could say, and does not now, is left to the worker."""
    if not isinstance(preflight.request.model, HubModel):
        return None
    error = None if seen is None or seen.error is None else seen.error.exception()
    if isinstance(error, InputError):
        preflight.add(error, "model")
        return None
    if error is not None:
        preflight.warnings.append(f"model: {error.detail}; the worker will look at the model")
    if seen is None or seen.found is None:
        preflight.not_checked = "hub"
        return None
    preflight.warnings += [f"model: {seen.renamed}"] if seen.renamed else []
    return seen.found.inspection()


def runtime_warnings(request: JobRequest) -> list[str]:
    """Runtimes that load a requested format, but not with these widths or groups, or not on every device."""
    spec = request.quantization
    head = spec.head_scheme()
    schemes = {scheme for _, scheme in spec.schemes()} | ({head} if head is not None else set())
    warnings = [
        warning
        for name in request.formats
        for scheme in sorted(schemes, key=lambda s: (s.bits, s.group_size, s.symmetric))
        for warning in runtime_limits(FORMATS[name].runtimes, f"{name.value} of {described(scheme)}", scheme)
    ]
    embeddings = spec.embeddings_scheme()
    if embeddings is not None:
        for name in request.formats:
            what = f"{name.value} with embeddings of {described(embeddings)}"
            warnings += runtime_limits(FORMATS[name].runtimes, what, embeddings, embeddings=True)
    return warnings
