"""Answers of the Hub that are no files: which error each of them is, with its own message and way out."""

from collections.abc import Mapping

from bitwright.errors import (
    BitwrightError,
    HubRateLimited,
    SourceForbidden,
    SourceGated,
    SourceNotFound,
    Unavailable,
)

ERROR_CODE, RETRY_AFTER = "x-error-code", "retry-after"
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TOO_MANY = 401, 403, 404, 429
LONGEST_WAIT = 86_400
"""Seconds; a header that says more is not repeated."""


def refusal_of(status: int, headers: Mapping[str, str], field: str, repo_id: str) -> BitwrightError:
    """The error of an answer with this status; `headers` by any case of their names.

    The Hub says 401 for a repository that does not exist to whoever shows no token, lest names be guessed.
    """
    found = {name.lower(): value for name, value in headers.items()}
    code = found.get(ERROR_CODE, "")
    if status == TOO_MANY:
        return _rate_limited(found.get(RETRY_AFTER, ""), field, repo_id)
    if code == "GatedRepo":
        detail = f"{repo_id} is gated: its terms must be accepted before anything of it is given"
        hint = "accept them on its page with the account of the service's token, BITWRIGHT_HUB_TOKEN"
        return SourceGated(detail, field=field, value=repo_id, hint=hint)
    if code == "RevisionNotFound":
        hint = "name a branch, a tag or a commit that exists"
        return SourceNotFound("the repository has no such revision", field=field, value=repo_id, hint=hint)
    if code == "EntryNotFound":
        hint = "check the id and the revision"
        return SourceNotFound("the Hub has no such file", field=field, value=repo_id, hint=hint)
    if code == "RepoNotFound" or status == NOT_FOUND:
        hint = "check the id; for a private repository the operator sets BITWRIGHT_HUB_TOKEN"
        return SourceNotFound("the Hub has no such repository", field=field, value=repo_id, hint=hint)
    if status in (UNAUTHORIZED, FORBIDDEN):
        hint = "the operator's token, BITWRIGHT_HUB_TOKEN, must be allowed to read it"
        return SourceForbidden(f"the Hub answers {status}", field=field, value=repo_id, hint=hint)
    return Unavailable(f"the Hub answers {status}", field=field, value=repo_id)


def renamed(asked: str, found: str) -> str | None:
    """The message about a repository that has another name now; None if it has the one that was asked for."""
    if asked.lower() == found.lower():
        return None
    return f"the repository {asked} has been renamed to {found}, and is read under that name; name it so from now on"


def _rate_limited(retry_after: str, field: str, repo_id: str) -> HubRateLimited:
    seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 9 else None
    when = f"; it asks to wait {seconds} seconds" if seconds is not None and seconds <= LONGEST_WAIT else ""
    hint = "the job is tried again by itself; with a token, BITWRIGHT_HUB_TOKEN, the Hub allows more"
    return HubRateLimited(
        f"the Hub has had too many requests of this address{when}", field=field, value=repo_id, hint=hint
    )
