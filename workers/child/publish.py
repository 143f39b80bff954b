"""`python -m workers.child.publish FOLDER`: commits the files of a result to a repository of the Hub.

It has the network and the token of one tenant or job, from its environment, and nothing else of the service. Large
files are sent before the commit that names them, and the Hub keeps what it has received: a child that comes after a
broken one sends the rest. The commit is made on top of the one that was judged, so that nobody else's is lost between.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from app.domain.attempt_lines import PublishedLine, RefusedLine
from app.hub.answers import RETRY_AFTER
from bitwright.errors import (
    BitwrightError,
    Conflict,
    HubRateLimited,
    InternalError,
    InvalidRequest,
    SourceForbidden,
    Unavailable,
)
from bitwright.events import ErrorData
from workers.child.lifeline import (
    ATTEMPT,
    EXIT_FAILED,
    JOB_ID,
    ReportPipe,
    follow_supervisor,
    log_as_json,
    name_in_log,
)
from workers.disk.orders import PublishOrder

MARK = "Bitwright: "
"""Beginning of every commit's title, by which a later publication knows that nobody has worked on top of it."""
OF_THE_HUB = frozenset({".gitattributes"})
"""Files that a repository has from its beginning."""
TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]
"""HTTPError of the HTTP library that this version of huggingface_hub stands on (httpx or httpx2)."""
LONGEST_WAIT = 86_400
"""Seconds; a header that says more is not believed."""

log = structlog.get_logger("workers.child.publish")


def main(arguments: list[str]) -> int:
    """Publish what the order in the folder `arguments[0]` names; the exit code."""
    follow_supervisor()
    log_as_json()
    name_in_log(os.environ[JOB_ID], int(os.environ[ATTEMPT]))
    report = ReportPipe()
    order = PublishOrder.model_validate_json((Path(arguments[0]) / "publish.json").read_bytes())
    try:
        report.write(publish(order, HfApi()))
    except BaseException as error:
        known = (
            error if isinstance(error, BitwrightError) else InternalError(f"{type(error).__name__} while publishing")
        )
        log.error("publishing_failed", code=known.code, kind=type(error).__name__)  # no traceback: it may hold headers
        report.write(RefusedLine(error=ErrorData.of(known), wait_seconds=wait_of(error)))
        return EXIT_FAILED
    return 0


def publish(order: PublishOrder, api: HfApi) -> PublishedLine:
    """Make the repository if it is not there, and commit the files to it.

    Raises:
        Conflict: its last commit is somebody else's, and the order does not say to commit all the same.
        SourceForbidden: the token may not write there.
        HubRateLimited, Unavailable: the Hub has no time now, or cannot be reached; another attempt may do.
    """
    with hub_errors(order.repository):
        head, others = _judged(order, api)
        files = {str(p.relative_to(order.folder)): p for p in sorted(Path(order.folder).rglob("*")) if p.is_file()}
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in sorted(others - set(files))),
        ]
        commit = api.create_commit(
            order.repository, operations, commit_message=f"{MARK}{order.job_id}", parent_commit=head, revision="main"
        )
    return PublishedLine(url=str(commit.commit_url), commit=commit.oid)


def _judged(order: PublishOrder, api: HfApi) -> tuple[str | None, frozenset[str]]:
    """The commit to commit on top of, and files of earlier results, which go.

    In a repository that others write to all files stay.
    """
    try:
        found = api.model_info(order.repository)
    except RepositoryNotFoundError:
        api.create_repo(order.repository, private=order.private, exist_ok=True)
        found = api.model_info(order.repository)
    paths = frozenset(sibling.rfilename for sibling in found.siblings or []) - OF_THE_HUB
    last = next(iter(api.list_repo_commits(order.repository)), None)
    if last is not None and last.title.startswith(MARK):
        return found.sha, paths
    if paths and not order.force:
        hint = 'take another repository, or send "force": true, which keeps the other files'
        title = "" if last is None else f" ({last.title[:60]!r})"
        detail = f"the last commit of {order.repository}{title} is not of Bitwright"
        raise Conflict(detail, field="publish.hub", value=order.repository, hint=hint)
    return found.sha, frozenset()


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """The Hub's errors in the words of the error tree."""
    try:
        yield
    except BitwrightError:
        raise
    except HFValidationError as error:
        hint = "name it ORGANISATION/NAME in letters, digits, '-', '_' and '.'"
        raise InvalidRequest("the Hub takes no such name", field="publish.hub", value=repository, hint=hint) from error
    except ValueError as error:  # a model card, or files, that the Hub refuses by a text of its own
        said = (str(error).splitlines() or [""])[0][:200]
        detail = f"the Hub refuses the files: {said}"
        hint = "download the checkpoint, mend what the Hub names, and upload it with hf upload"
        raise InvalidRequest(detail, field="publish.hub", value=repository, hint=hint) from error
    except HfHubHTTPError as error:
        raise _of_answer(error.response.status_code, repository) from error
    except (TransportError, ConnectionError, TimeoutError) as error:
        hint = "it is tried again by itself"
        raise Unavailable("the Hub cannot be reached", field="publish.hub", value=repository, hint=hint) from error


def _of_answer(status: int, repository: str) -> BitwrightError:
    kind, detail, hint = _KINDS.get(status, _DOWN if status >= 500 else _OTHER)
    return kind(f"the Hub answers {status}: {detail}", field="publish.hub", value=repository, hint=hint)


_AGAIN = "it is tried again by itself"
_WRITES = "the token must be allowed to write there; send one with X-Hub-Token"
_Kind = tuple[type[BitwrightError], str, str]
_DOWN: _Kind = (Unavailable, "it has a fault", _AGAIN)
_OTHER: _Kind = (SourceForbidden, "it does not take the files", "look at the repository's page")
_KINDS: dict[int, _Kind] = {
    401: (SourceForbidden, "it does not know the token", _WRITES),
    403: (SourceForbidden, "the token may not write there", _WRITES),
    409: (Unavailable, "somebody else committed meanwhile", _AGAIN),
    412: (Unavailable, "somebody else committed meanwhile", _AGAIN),
    429: (HubRateLimited, "it has had too many requests", _AGAIN),
}


def wait_of(error: BaseException) -> int:
    """Seconds that the Hub asks to wait in the answer that an error comes from; 0 if it asks for none."""
    cause = error.__cause__
    told = cause.response.headers.get(RETRY_AFTER, "") if isinstance(cause, HfHubHTTPError) else ""
    return min(int(told), LONGEST_WAIT) if told.isascii() and told.isdigit() and len(told) < 9 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
