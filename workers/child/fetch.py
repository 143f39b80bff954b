"""`python -m workers.child.fetch WORKSPACE`: brings a job's model and texts from the Hub.

The only process with network access and the Hub token (from its environment). A branch is pinned to its commit once a
job. A model's configuration, file list, index and headers are judged before any of its weights are fetched; then its
weights are taken, its JSON and tokenizer files, and no copy of the same in another format. Nothing that is fetched is
ever executed.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import structlog
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from app.domain.attempt_lines import FetchedLine
from app.domain.inputs.inspection import FolderFiles, weight_files
from app.hub.answers import refusal_of, renamed
from app.hub.repository import Allowance, HubFiles, HubReader, Repository
from bitwright.errors import BitwrightError, InvalidDataset, SourceForbidden, SourceNotFound, Unavailable
from bitwright.events import TEXT_ROLES, ProgressEvent, Stage, WarningEvent
from workers.child.dataset_rows import dataset_rows
from workers.child.examination import examine, require_disk
from workers.child.exceptions import as_bitwright_error
from workers.child.lifeline import (
    ATTEMPT,
    EXIT_FAILED,
    JOB_ID,
    ReportPipe,
    follow_supervisor,
    log_as_json,
    name_in_log,
)
from workers.disk.durable import replace_file, sync_tree
from workers.disk.hub_cache import holding
from workers.disk.orders import FetchOrder, TextOrder

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
VOCABULARIES = ("tokenizer*", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "vocab.bpe", "bpe.codes")
ALLOWED = ("*.json", "*.txt", "*.jinja", "README.md", *VOCABULARIES, *LICENCES)
IGNORED = (".*", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*.msgpack", "*.h5", "*.gguf")
TEMPLATES = "additional_chat_templates/"
"""The one folder of a repository that belongs to a checkpoint."""
LOOK_SECONDS, LOOK_BYTES = 300.0, 512 << 20
"""Limits of what is read to judge a model; the headers of a thousand shards take a tenth of either."""
TEXT_COLUMNS = ("text", "prompt", "completion", "messages", "conversations")
BESIDE_COLUMNS = ("tools", "functions", "system", "chat_template_kwargs")
"""Read beside messages, and dropped beside texts, where they say something else."""
TASK_COLUMNS = ("question", "choices", "answer")
COMPLETE = ".complete"
TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]
"""HTTPError of the HTTP library that this version of huggingface_hub stands on (httpx or httpx2)."""

log = structlog.get_logger("workers.child.fetch")


def main(arguments: list[str]) -> int:
    """Fetch what the order in the workspace folder `arguments[0]` names; the exit code."""
    follow_supervisor()
    log_as_json()
    name_in_log(os.environ[JOB_ID], int(os.environ[ATTEMPT]))
    return obey(Path(arguments[0]), ReportPipe())


def obey(workspace: Path, report: ReportPipe) -> int:
    """Fetch what the order in the workspace names, and say how that ended; the exit code."""
    try:
        order = FetchOrder.model_validate_json((workspace / "fetch.json").read_bytes())
        leave_working_folder(workspace)
        report.write(fetch(order, workspace, report))
    except BaseException as error:
        known = as_bitwright_error(error)
        log.error("fetch_failed", code=known.code, exc_info=error)
        report.fail(known)
        return EXIT_FAILED
    return 0


def leave_working_folder(workspace: Path) -> None:
    """Work in an empty folder: `datasets` takes an id that is also a path from here for that local folder."""
    empty = workspace / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    os.chdir(empty)


def fetch(order: FetchOrder, workspace: Path, report: ReportPipe) -> FetchedLine:
    """Bring everything; what an earlier attempt brought is not brought again, and its commits stay pinned."""
    pins = Pins(workspace / "fetched.json")
    folder, revision = "", None
    if order.model is not None:
        with hub_errors("model", order.model.id), hub_reader() as reader:
            given = order.model.id, order.model.revision
            revision = pins.commit("model", lambda: reader.repository(*given).commit)
            folder = str(fetch_model(order, order.model.id, revision, reader, report))
    for field, text in order.texts.items():
        if not Path(text.path).exists():
            with hub_errors(field, text.dataset.id):
                pin = TEXT_ROLES.get(field, field)
                commit = pins.commit(pin, partial(_commit, text.dataset.id, text.dataset.revision))
                write_text(text, commit)
    paths = {f"{TEXT_ROLES[field]}_path": text.path for field, text in order.texts.items() if field in TEXT_ROLES}
    others = {field: text.path for field, text in order.others.items()}
    return FetchedLine(model_path=folder, model_revision=revision, other_texts=others, **paths)


class Pins:
    """The commits that a job's sources are pinned to, in a file of its workspace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._commits: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}

    def commit(self, role: str, resolve: Callable[[], str]) -> str:
        """The pinned commit of a role; resolved and kept at the first call."""
        if role not in self._commits:
            self._commits[role] = resolve()
            replace_file(self._path, json.dumps(self._commits).encode())
        return self._commits[role]


def _commit(repo_id: str, revision: str) -> str:
    info = HfApi().repo_info(repo_id, repo_type="dataset", revision=revision)
    if info.sha is None:
        hint = "name a branch, a tag or a commit that exists"
        raise SourceNotFound("the Hub names no commit for this revision", field="revision", value=revision, hint=hint)
    return info.sha


@contextmanager
def hub_reader() -> Iterator[HubReader]:
    """A reader of the Hub that this process's environment names, with its token."""
    with httpx.Client() as client:
        allowance = Allowance(LOOK_SECONDS, LOOK_BYTES)
        yield HubReader(client, allowance, constants.ENDPOINT, get_token() or None, elsewhere=True)


def fetch_model(order: FetchOrder, repo_id: str, commit: str, reader: HubReader, report: ReportPipe) -> Path:
    """The folder with the checkpoint's files, downloaded unless another job did it. Real files, no links.

    Raises:
        InputError, InvalidRequest: the repository holds no model that the order's request fits.
        ExceedsCapacity, DiskFull: the job or its files do not fit this machine.
    """
    owner = "" if order.tenant_id is None else f"+{order.tenant_id}"
    folder = Path(order.models_folder) / f"{repo_id.replace('/', '--')}@{commit}{owner}"
    with holding(folder):
        if (folder / COMPLETE).exists():
            examine(order, FolderFiles(folder), report)
        else:
            repository = reader.repository(repo_id, commit)
            moved = renamed(repo_id, repository.id)
            if moved is not None:
                report.write(WarningEvent(code="repository_renamed", message=moved))
            files = HubFiles(reader, repository)
            results = examine(order, files, report)
            wanted = sorted({*weight_files(files), *needed_files(repository)})
            size = sum(map(repository.size, wanted))
            require_disk(size, folder, results, Path.cwd(), repo_id)
            _download(repository, wanted, folder, report)
    return folder


def needed_files(repository: Repository) -> list[str]:
    """Files of a checkpoint beside its weights: those at the top of the repository, and its chat templates."""
    top = [name for name in repository.sizes if "/" not in name.removeprefix(TEMPLATES)]
    return list(filter_repo_objects(top, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)))


def _download(repository: Repository, wanted: list[str], folder: Path, report: ReportPipe) -> None:
    with progress_of(folder, sum(map(repository.size, wanted)), report):
        snapshot_download(repository.id, revision=repository.commit, local_dir=folder, allow_patterns=wanted)
    sync_tree(folder)  # else a power cut leaves a folder that is complete by its mark alone, for all jobs to come
    (folder / COMPLETE).touch()


@contextmanager
def progress_of(folder: Path, total: int, report: ReportPipe) -> Iterator[None]:
    """Report once per second how many of `total` bytes lie in the folder, finished or not."""
    done = threading.Event()

    def measure() -> None:
        while not done.wait(1):
            with suppress(OSError):  # files are renamed while they are counted
                here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                report.write(ProgressEvent(stage=Stage.FETCH, done=min(here, total), total=total, unit="bytes"))

    thread = threading.Thread(target=measure, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    report.write(ProgressEvent(stage=Stage.FETCH, done=total, total=total, unit="bytes"))


def write_text(order: TextOrder, commit: str) -> None:
    """Stream the dataset's rows into a JSONL file until it holds enough text. Whole or not at all.

    Raises:
        InvalidDataset: no such configuration or split, or rows without a known column.
    """
    dataset = order.dataset
    try:
        rows = dataset_rows(dataset, commit)
        lines = list(text_lines(rows, order))
    except ValueError as error:  # an unknown configuration or split, a file that is no table
        hint = "name a configuration and a split that the dataset has, and that is a table of text"
        raise InvalidDataset(f"{error}".splitlines()[0][:300], field="dataset", value=dataset.id, hint=hint) from error
    if not lines:
        hint = "name another split of the dataset"
        raise InvalidDataset("the split has no rows", field="dataset.split", value=dataset.split, hint=hint)
    replace_file(Path(order.path), "".join(lines).encode())


def _known_columns(order: TextOrder) -> tuple[str, ...]:
    return (*TEXT_COLUMNS, *TASK_COLUMNS) if order.asks else TEXT_COLUMNS


def text_lines(rows: Iterable[Mapping[str, object]], order: TextOrder) -> Iterator[str]:
    """JSON lines of the known columns of `rows`, until `order.characters` are reached."""
    characters = 0
    for row in rows:
        known = _known_columns(order)
        kept = {name: row[name] for name in known if row.get(name) is not None}
        if kept.keys() & {"messages", "conversations"}:
            kept |= {name: row[name] for name in BESIDE_COLUMNS if row.get(name) is not None}
        if not kept:
            hint = f"rows need one of: {', '.join(known)}"
            columns = ", ".join(row)
            raise InvalidDataset(f"the rows have the columns {columns}", value=order.dataset.id, hint=hint)
        # Of tables with types of their own, such as Parquet's, a time is its usual text.
        line = json.dumps(kept, ensure_ascii=False, default=str) + "\n"
        characters += len(line)
        yield line
        if characters >= order.characters:
            return


@contextmanager
def hub_errors(field: str, repo_id: str) -> Iterator[None]:
    """The Hub's errors in the words of the error tree."""
    try:
        yield
    except BitwrightError:
        raise
    except HFValidationError as error:
        hint = "check the id; for a private repository the operator sets BITWRIGHT_HUB_TOKEN"
        raise SourceNotFound("the Hub has no such repository", field=field, value=repo_id, hint=hint) from error
    except HfHubHTTPError as error:
        raise _of_answer(error, field, repo_id) from error
    except (TransportError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        hint = "the job is tried again by itself; on a machine without network use a local path or an upload"
        raise Unavailable("the Hub cannot be reached", field=field, value=repo_id, hint=hint) from error


def _of_answer(error: HfHubHTTPError, field: str, repo_id: str) -> BitwrightError:
    """The same error as a look at the repository would give; huggingface_hub's kinds say what a code may leave out."""
    kinds = {GatedRepoError: "GatedRepo", RepositoryNotFoundError: "RepoNotFound"}
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), None)
    if isinstance(error, DisabledRepoError):
        hint = "its owner or the Hub has taken it away; take another repository"
        return SourceForbidden("access to the repository is disabled", field=field, value=repo_id, hint=hint)
    headers = dict(error.response.headers) | ({} if code is None else {"x-error-code": code})
    return refusal_of(error.response.status_code, headers, field, repo_id)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
