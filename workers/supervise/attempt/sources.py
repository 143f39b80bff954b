"""Paths of an attempt's model and texts on this machine.

Local paths are checked against the roots again (the request was checked on another machine, perhaps long ago), uploads
are taken from the blob store, and what is left for the Hub goes into a `FetchOrder`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from app.domain.inputs.roots import ALLOWED_HINT, check_links, lies_under
from app.domain.request.evaluation_tasks import EvaluationTask
from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import Calibration, Evaluation, JobRequest
from app.domain.request.mixtures import MixedPart
from app.domain.request.source_walk import NamedSource, read_sources
from app.domain.request.sources import (
    HubDataset,
    HubModel,
    LocalModel,
    LocalText,
    Source,
    UploadedModel,
    UploadedText,
)
from app.store.blobs import materialise
from app.store.uploads import UploadRepository
from bitwright.errors import CorruptCheckpoint, InvalidDataset, NotFound, SourceForbidden, SourceNotFound
from bitwright.events import TEXT_ROLES
from workers.disk.orders import FetchOrder, TextOrder
from workers.disk.workspace import Workspace
from workers.supervise.context import WorkerContext

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average on text, so that a fetched head of a dataset is long enough."""
MIXED_SURPLUS, KIND_SURPLUS = 2, 8
"""Times as many tokens as a part of a mixture gives are fetched of its dataset, where all rows count and where not."""
LEAST_TOKENS = 1 << 16


def fetch_order(
    request: JobRequest, workspace: Workspace, models_folder: Path, capacity: Mapping[str, int | None] | None = None
) -> FetchOrder:
    """Models and texts to fetch from the Hub. Equal datasets are fetched once, into one file.

    capacity   the worker's, in bytes by name, against which the job is judged before it is fetched
    """
    model = request.model if isinstance(request.model, HubModel) and not request.exports else None
    wanted = [
        (named.field, named.source, tokens_read(request, named))
        for named in read_sources(request)
        if isinstance(named.source, HubDataset)
    ]
    orders: dict[str, TextOrder] = {}
    for field, dataset, _ in wanted:
        sharing = [(other, size) for other, same, size in wanted if same == dataset and _asks(other) == _asks(field)]
        orders[field] = TextOrder(
            dataset=dataset,
            path=str(workspace.sources / f"{TEXT_ROLES.get(sharing[0][0], sharing[0][0])}.jsonl"),
            characters=CHARACTERS_PER_TOKEN * sum(size for _, size in sharing),
            asks=_asks(field),
        )
    roles = {TEXT_ROLES[field]: text for field, text in orders.items() if field in TEXT_ROLES}
    others = {field: text for field, text in orders.items() if field not in TEXT_ROLES}
    known = {name: size for name, size in (capacity or {}).items() if size is not None}
    return FetchOrder(
        model=model, models_folder=str(models_folder), request=request, capacity=known, others=others, **roles
    )


def _asks(field: str) -> bool:
    """True if a field of a request names rows of a task."""
    return field.startswith("evaluation.tasks.")


def tokens_read(request: JobRequest, named: NamedSource) -> int:
    """Tokens of its dataset that a part of a request reads at the most."""
    section = named.section
    if isinstance(section, MixedPart):
        # Some rows are held out, and others are of another kind.
        more = MIXED_SURPLUS if section.kind is None else KIND_SURPLUS
        return max(LEAST_TOKENS, int(section.share * request.calibration.tokens_read * more))
    if not isinstance(section, Calibration | Evaluation | Finetune | EvaluationTask):
        raise TypeError(f"{type(section).__name__} does not say how much of its dataset is read")
    return section.tokens_read


def model_path(context: WorkerContext, tenant_id: str, request: JobRequest, workspace: Workspace) -> str | None:
    """The folder of a local or uploaded checkpoint; None for one that the fetch brings.

    Raises:
        SourceNotFound: no such folder or upload.
        SourceForbidden: the folder lies outside the roots, or a link in it leads there.
    """
    model, roots = request.model, context.settings.model_roots
    if isinstance(model, LocalModel):
        folder = under_roots(model.path, roots, field="model")
        check_links(folder, roots)
        return str(folder)
    if isinstance(model, UploadedModel):
        return str(materialise_upload(context, tenant_id, model.id, workspace, field="model"))
    return None


def text_path(
    context: WorkerContext,
    tenant_id: str,
    dataset: Source,
    workspace: Workspace,
    *,
    field: str,
) -> str | None:
    """The file of a local or uploaded text; None for builtin and generated text and for what the fetch brings.

    Raises:
        SourceNotFound, SourceForbidden: as for models.
        InvalidDataset: an upload of several files.
    """
    if isinstance(dataset, LocalText):
        return str(under_roots(dataset.path, context.settings.model_roots, field=field))
    if isinstance(dataset, UploadedText):
        folder = materialise_upload(context, tenant_id, dataset.id, workspace, field=field)
        files = [path for path in folder.rglob("*") if path.is_file()]
        if len(files) != 1:
            hint = "upload one JSONL file; a line is an object with text, prompt and completion, or messages"
            raise InvalidDataset(f"the upload holds {len(files)} files", field=field, value=dataset.id, hint=hint)
        return str(files[0])
    return None


def under_roots(path: str, roots: Iterable[Path], *, field: str) -> Path:
    """The real path, if it exists and lies under a root (links are followed first).

    Raises:
        SourceForbidden: it does not lie under a root; whether it exists is not disclosed.
        SourceNotFound: it does not exist.
    """
    resolved = Path(path).expanduser().resolve()
    if not lies_under(resolved, roots):
        detail = "the path lies under none of the allowed folders"
        raise SourceForbidden(detail, field=field, value=path, hint=ALLOWED_HINT)
    if not os.path.exists(resolved):  # Path.exists raises for a name that is too long
        hint = "check the path; where the worker is another machine than yours, send the files with `bitwright upload`"
        raise SourceNotFound("there is no such path on the worker's machine", field=field, value=path, hint=hint)
    return resolved


def materialise_upload(
    context: WorkerContext, tenant_id: str, upload_id: str, workspace: Workspace, *, field: str
) -> Path:
    """The folder with the upload's files, taken from the blob store unless an earlier attempt did it.

    Raises:
        SourceNotFound: no such complete upload of this tenant.
        SourceForbidden: a file is named outside its folder.
        CorruptCheckpoint: a file's bytes are not those that were stored.
    """
    try:
        with context.database.reading() as session:
            upload = UploadRepository(session, tenant_id).get(upload_id)
            files = [(file.name, file.sha256, file.size) for file in upload.files]
            complete = upload.complete
    except NotFound as error:
        raise SourceNotFound(error.detail, field=field, value=upload_id, hint="upload it again") from error
    if not complete:
        raise SourceNotFound("the upload is not complete", field=field, value=upload_id, hint="complete it, and retry")
    folder = workspace.sources / upload_id
    for name, sha256, size in files:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            hint = "upload the files again, by plain names"
            raise SourceForbidden("the upload names a file outside its folder", field=field, value=name, hint=hint)
        there = target.exists() and target.stat().st_size == size
        if not there and not materialise(context.blobs, sha256, target):
            detail = f"{name} of the upload is damaged in the store"
            raise CorruptCheckpoint(detail, field=field, value=upload_id, hint="upload it again")
    return folder
