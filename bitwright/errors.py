"""The error tree. Every error has a stable `code`, an HTTP status and a rule for retrying the job.

BitwrightError
|-- RequestError              the caller can correct the request         (never retried)
|   |-- MalformedBody         400  malformed_body        not JSON
|   |-- Unauthenticated       401  unauthenticated       no key, or an unknown or revoked one
|   |-- MissingScope          403  missing_scope         the key lacks a scope
|   |-- ForeignPage           403  foreign_page          a form that a page of another site sent
|   |-- UnknownHost           421  unknown_host          the dashboard under a name that nobody gave it
|   |-- NotFound              404  not_found             no such id for this tenant
|   |-- MethodNotAllowed      405  method_not_allowed    the path exists, but not for this method
|   |-- Conflict              409  conflict              the resource is in another state
|   |   |-- IllegalTransition 409  illegal_transition    e.g. cancel of a finished job
|   |   `-- RequestInProgress 409  request_in_progress   same Idempotency-Key still running
|   |-- PreconditionFailed    412  precondition_failed   If-Match or If-Range does not hold
|   |-- BodyTooLarge          413  body_too_large
|   |-- RangeNotSatisfiable   416  range_not_satisfiable
|   |-- InvalidSettings       400  invalid_settings      a variable of the environment is wrong; no HTTP answer
|   |-- InvalidRequest        422  invalid_request       all problems at once in `errors`
|   |-- KeyReused             422  idempotency_key_reused
|   |-- ExceedsCapacity       422  exceeds_capacity      no worker could ever hold the job
|   `-- TooManyRequests       429  too_many_requests
|       `-- QuotaExceeded     429  quota_exceeded        a quota of the tenant; each kind has a code:
|           |-- RateLimitExceeded     rate_limit_exceeded
|           |-- QueuedJobsExceeded    queued_jobs_exceeded
|           |-- StorageExceeded       storage_exceeded
|           |-- UploadsExceeded       uploads_exceeded
|           `-- StreamsExceeded       streams_exceeded
|-- InputError                the job's model or data cannot be used     (job fails at once)
|   |-- SourceNotFound             source_not_found
|   |-- SourceForbidden            source_forbidden
|   |   `-- SourceGated            source_gated          a Hub repository whose terms are to be accepted
|   |-- UnusableBaseJob            base_job_unusable
|   |-- UnsupportedArchitecture    unsupported_architecture
|   |-- UnsafeCheckpoint           unsafe_checkpoint
|   |-- UnsupportedCheckpoint      unsupported_checkpoint
|   |-- CorruptCheckpoint          corrupt_checkpoint
|   |-- IndivisibleGroup           group_size_does_not_divide
|   |-- InvalidDataset             invalid_dataset
|   |-- OverLimit                  over_limit            took more time, memory or bytes than it may
|   |-- UnknownModule              unknown_module
|   |-- FormatCannotHold           format_cannot_hold
|   |-- MisalignedAdapter          misaligned_adapter
|   |-- OffsetNotRepresentable     offset_not_representable
|   |-- NumericalFailure           numerical_failure
|   |-- RuntimeDidNotLoad          runtime_did_not_load
|   |-- GoalOutOfReach             goal_out_of_reach     has the frontier
|   `-- RequirementMissed          requirement_missed
|-- ResourceError             the machine was too small
|   |-- OutOfGpuMemory             out_of_gpu_memory     (once more, with smaller micro-batches)
|   |-- OutOfMemory                out_of_memory         (once more, with smaller micro-batches)
|   |-- DiskFull                   disk_full
|   `-- TimeLimitExceeded          time_limit_exceeded
`-- PlatformError             our fault                                  (retried with back-off)
    |-- WorkerLost                 worker_lost           the lease ran out
    |-- AttemptKilled              attempt_killed        the process ended by a signal
    |-- AttemptSuperseded          attempt_superseded    the fence refused a stale write
    |-- CudaError                  cuda_error
    |-- StorageError               storage_error
    |-- Unavailable           503  unavailable           database or broker out of reach
    |   `-- HubRateLimited    503  hub_rate_limited      the Hub wants fewer requests
    `-- InternalError         500  internal_error
"""

from enum import StrEnum
from typing import ClassVar

from bitwright.field_problem import FieldProblem as FieldProblem  # noqa: PLC0414 (the same)
from bitwright.frontier import FrontierPoint
from bitwright.shortening import shorten as shorten  # noqa: PLC0414 (others have it from here)


class Retry(StrEnum):
    """Policy of the store for a job whose attempt ended with this error."""

    NEVER = "never"
    SMALLER = "smaller"  # one more attempt, with smaller micro-batches
    LATER = "later"  # back to the queue after a delay, while retries remain


class BitwrightError(Exception):
    """Any error with a code. `detail` is for people; programs look at `code`.

    `field`, `value` and `hint` say which input is at fault, what it was and the way out. Without an
    explicit hint it is that of the class, from the row of docs/reference/errors.md; `errors` have one in each problem.
    """

    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Error"
    status: ClassVar[int] = 500
    retry: ClassVar[Retry] = Retry.NEVER
    way_out: ClassVar[str] = "The root of the tree; nothing raises it."

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        value: object = None,
        hint: str | None = None,
        errors: tuple[FieldProblem, ...] = (),
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field
        self.value = shorten(value)
        self.hint = hint or (None if errors else self.way_out)
        self.errors = errors
        problems = [f"{each.field}: {each.detail}" for each in errors] if len(errors) > 1 else []
        for note in [*problems, *([self.hint] if self.hint else [])]:
            self.add_note(note)  # a traceback shows it below the detail


class RequestError(BitwrightError):
    code, title, status = "bad_request", "Bad request", 400
    way_out = "Mend what `detail` names."


class MalformedBody(RequestError):
    code, title = "malformed_body", "The body is not valid JSON"
    way_out = "Send JSON with `Content-Type: application/json`."


class Unauthenticated(RequestError):
    code, title, status = "unauthenticated", "A valid API key is needed", 401
    way_out = "Send `Authorization: Bearer bw_...`; `bitwright keys create` makes one."


class MissingScope(RequestError):
    code, title, status = "missing_scope", "The API key lacks a scope", 403
    way_out = "Use a key with the scope that `detail` names (read, submit, admin)."


class ForeignPage(RequestError):
    code, title, status = "foreign_page", "The request comes from a page of another site", 403
    way_out = "Load the page anew and send it from there; a proxy must pass `Host` on as the browser sent it."


class UnknownHost(RequestError):
    code, title, status = "unknown_host", "The service is not known under this name", 421
    way_out = "Open the service by its address, or put the name into `BITWRIGHT_PAGE_HOSTS`."


class NotFound(RequestError):
    code, title, status = "not_found", "Not found", 404
    way_out = "Check the id; another tenant's ids look the same as ids that do not exist."


class MethodNotAllowed(RequestError):
    code, title, status = "method_not_allowed", "The path does not take this method", 405
    way_out = "`Allow` lists those that it takes."


class Conflict(RequestError):
    code, title, status = "conflict", "The resource is in another state", 409
    way_out = "Read the resource again, then decide."


class IllegalTransition(Conflict):
    code, title = "illegal_transition", "The job's status does not allow this"
    way_out = "Only queued and running jobs can be cancelled, only failed and cancelled ones retried."


class RequestInProgress(Conflict):
    code, title = "request_in_progress", "A request with this Idempotency-Key is still running"
    way_out = "Wait a second and send it again."


class PreconditionFailed(RequestError):
    code, title, status = "precondition_failed", "A precondition does not hold", 412
    way_out = "The content changed: start the download again without If-Match."


class BodyTooLarge(RequestError):
    code, title, status = "body_too_large", "The body is too large", 413
    way_out = "JSON is limited to `BITWRIGHT_MAX_BODY_BYTES`; send data through /v1/uploads, in parts."


class RangeNotSatisfiable(RequestError):
    code, title, status = "range_not_satisfiable", "The range lies outside the content", 416
    way_out = "Ask for a range below the `Content-Range` total."


class InvalidSettings(RequestError):
    code, title, status = "invalid_settings", "A setting is not valid", 400
    way_out = (
        "The message names the variable, its value and what it may be. Processes of the service and commands end "
        "with it; no HTTP request is answered so."
    )


class InvalidRequest(RequestError):
    code, title, status = "invalid_request", "The request is not valid", 422
    way_out = "Mend every problem that `errors` lists, with field, value and way out; or what `detail` names."


class KeyReused(RequestError):
    code, title, status = "idempotency_key_reused", "The Idempotency-Key was used for another request", 422
    way_out = "Use a fresh key for another body."


class ExceedsCapacity(RequestError):
    code, title, status = "exceeds_capacity", "No worker could hold the job", 422
    way_out = (
        "Fewer or shorter calibration sequences, a smaller model, or a larger worker; `?dry_run=true` shows "
        "the estimates of what fits."
    )


class TooManyRequests(RequestError):
    code, title, status = "too_many_requests", "Too many requests", 429
    way_out = "Wait for `Retry-After` seconds."


class QuotaExceeded(TooManyRequests):
    """A quota of the tenant is used up; `policy` names it in `RateLimit` and `violated-policies`.

    quota                 what the tenant may have; None where the answer of another service is told
    retry_after_seconds   when to ask again
    window_seconds        of a rate: the length of the window that the quota is for
    """

    code, title = "quota_exceeded", "A quota of the tenant is used up"
    way_out = "`GET /v1/usage` shows quotas and what is used of them; the operator can raise one."
    policy: ClassVar[str] = "quota"
    unit: ClassVar[str | None] = None

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        value: object = None,
        hint: str | None = None,
        errors: tuple[FieldProblem, ...] = (),
        quota: int | None = None,
        retry_after_seconds: int = 30,
        window_seconds: int | None = None,
    ) -> None:
        super().__init__(detail, field=field, value=value, hint=hint, errors=errors)
        self.quota = quota
        self.retry_after_seconds = retry_after_seconds
        self.window_seconds = window_seconds


class RateLimitExceeded(QuotaExceeded):
    code, title, policy = "rate_limit_exceeded", "The tenant sends more POST requests a minute than it may", "posts"
    way_out = "Wait for `Retry-After` seconds; `RateLimit` tells in every answer what is left."


class QueuedJobsExceeded(QuotaExceeded):
    code, title, policy = "queued_jobs_exceeded", "As many jobs of the tenant wait as may", "queued-jobs"
    way_out = "Submit again when one has begun, or cancel one that waits."


class StorageExceeded(QuotaExceeded):
    code, title, policy = "storage_exceeded", "The tenant's storage is used up", "storage"
    unit = "content-bytes"
    way_out = "Delete jobs or uploads that are no longer needed, or ask the operator for more."


class UploadsExceeded(QuotaExceeded):
    code, title, policy = "uploads_exceeded", "The tenant has as many uploads as it may", "uploads"
    way_out = "Delete an upload that no job reads any more; `GET /v1/uploads` lists them."


class StreamsExceeded(QuotaExceeded):
    code, title, policy = "streams_exceeded", "The tenant follows as many event streams as it may", "streams"
    unit = "concurrent-requests"
    way_out = "Close one, or poll the JSON page of events instead."


class InputError(BitwrightError):
    code, title, status = "invalid_input", "The job's input cannot be used", 422
    way_out = "Mend what `detail` names, and submit again."


class SourceNotFound(InputError):
    code, title = "source_not_found", "The model or dataset was not found"
    way_out = "Check id, revision or path; a local path must lie under `BITWRIGHT_MODEL_ROOTS` on the worker."


class SourceForbidden(InputError):
    code, title = "source_forbidden", "The model or dataset may not be read"
    way_out = (
        "Local folders are read under the roots alone: `bitwright serve --model-root FOLDER` "
        "(`BITWRIGHT_MODEL_ROOTS`), or send the files with `bitwright upload`. On the Hub, accept the model's "
        "licence and set `BITWRIGHT_HUB_TOKEN`."
    )


class SourceGated(SourceForbidden):
    code, title = "source_gated", "The repository's terms must be accepted first"
    way_out = "Accept the terms on the repository's page, with the account of the service's `BITWRIGHT_HUB_TOKEN`."


class UnusableBaseJob(InputError):
    code, title = "base_job_unusable", "No job can start from this base job"
    way_out = (
        "Name a job that succeeded, whose `native` checkpoint is still there and whose adapter can go on, or "
        "quantize anew: leave `base_job` out."
    )


class UnsupportedArchitecture(InputError):
    code, title = "unsupported_architecture", "The model's architecture is not supported"
    way_out = (
        "Choose a model of an accepted `model_type`, in 16 or 32 bits: `GET /v1/architectures` lists them, and says "
        "why others are not."
    )


class UnsafeCheckpoint(InputError):
    code, title = "unsafe_checkpoint", "The checkpoint holds no safetensors"
    way_out = "Convert it: `.bin` and `.pt` files can run code when they are read."


class UnsupportedCheckpoint(InputError):
    code, title = "unsupported_checkpoint", "The files are no checkpoint that can be quantized"
    way_out = (
        "Give config.json with model.safetensors, or with shards and their index; `detail` says what the files are."
    )


class CorruptCheckpoint(InputError):
    code, title = "corrupt_checkpoint", "The checkpoint is damaged or inconsistent"
    way_out = "Fetch or send it again; `detail` names the file or tensor."


class IndivisibleGroup(InputError):
    code, title = "group_size_does_not_divide", "The group size does not divide a linear's inputs"
    way_out = "Take a divisor of the size that `detail` names, -1, or an override for that linear."


class InvalidDataset(InputError):
    code, title = "invalid_dataset", "The dataset cannot be used"
    way_out = (
        "JSONL, each line an object with `text`, `prompt` and `completion`, or `messages`; enough text for "
        "the samples asked for."
    )


class OverLimit(InputError):
    code, title = "over_limit", "The job took more than it may"
    way_out = (
        "Give less: `detail` names the file and the limit. What reads a job's input has `BITWRIGHT_INPUT_SECONDS` and "
        "`BITWRIGHT_INPUT_MEMORY_BYTES`, an attempt what its plan needs (`BITWRIGHT_ATTEMPT_MEMORY`); the operator "
        "may raise them."
    )


class UnknownModule(InputError):
    code, title = "unknown_module", "A module pattern matches no linear of the model"
    way_out = "Patterns are globs over full names such as `model.layers.*.mlp.down_proj`."


class FormatCannotHold(InputError):
    code, title = "format_cannot_hold", "The format cannot hold the result"
    way_out = (
        "Other bits or symmetry, or another format: see GET /v1/formats. Low-rank factors need `peft` or `merged`."
    )


class MisalignedAdapter(InputError):
    code, title = "misaligned_adapter", "An adapter's pools or tiles do not fit a linear or its groups"
    way_out = "`detail` names linear and number, the hint those that fit; or leave `pool_in` and `repeat_out` out."


class OffsetNotRepresentable(InputError):
    code, title = "offset_not_representable", "A merged adapter's offsets cannot be stored as asked"
    way_out = (
        "Ask for `native` or `gguf`, which hold fractional offsets; or set `round_offset` and accept the "
        "error that the report tells."
    )


class NumericalFailure(InputError):
    code, title = "numerical_failure", "The computation gave a value that is not finite"
    way_out = (
        "Check the checkpoint, and whether its dtype overflows (bfloat16 in config.json); raise bits or lower "
        "the learning rate."
    )


class RuntimeDidNotLoad(InputError):
    code, title = "runtime_did_not_load", "A runtime does not load what the job would make"
    way_out = (
        "`detail` has the runtime's last lines: leave the format out, change the scheme, or set `verify` to `off` if "
        "it is served elsewhere."
    )


class GoalOutOfReach(InputError):
    code, title = "goal_out_of_reach", "No choice of schemes reaches the goal"
    way_out = "`frontier` has the sizes and distances that can be reached: loosen the goal, or widen its `choices`."

    def __init__(
        self,
        detail: str,
        *,
        field: str | None = None,
        value: object = None,
        hint: str | None = None,
        errors: tuple[FieldProblem, ...] = (),
        frontier: tuple[FrontierPoint, ...] = (),
    ) -> None:
        super().__init__(detail, field=field, value=value, hint=hint, errors=errors)
        self.frontier = frontier


class RequirementMissed(InputError):
    code, title = "requirement_missed", "The result misses a requirement of the request"
    way_out = "The report has the numbers: raise bits, or a better preset, or loosen `require`."


class ResourceError(BitwrightError):
    code, title, status = "resource_exhausted", "The machine was too small", 507
    way_out = "A larger machine, or less work: shorter or fewer sequences."


class OutOfGpuMemory(ResourceError):
    code, title, retry = "out_of_gpu_memory", "The GPU's memory was exhausted", Retry.SMALLER
    way_out = "Shorter sequences or a smaller `batch_size`; `detail` has the peak."


class OutOfMemory(ResourceError):
    code, title, retry = "out_of_memory", "The machine's memory was exhausted", Retry.SMALLER
    way_out = "Fewer or shorter calibration sequences; `detail` has the peak."


class DiskFull(ResourceError):
    code, title = "disk_full", "The disk is full"
    way_out = "Free space under `BITWRIGHT_DATA_DIR` and `BITWRIGHT_WORKSPACE_DIR`, then retry."


class TimeLimitExceeded(ResourceError):
    code, title = "time_limit_exceeded", "The attempt ran longer than its time limit"
    way_out = "Raise `time_limit_seconds`, then retry: finished blocks are kept."


class PlatformError(BitwrightError):
    code, title, status, retry = "platform_error", "The service failed", 500, Retry.LATER
    way_out = "Look into the worker's log."


class WorkerLost(PlatformError):
    code, title = "worker_lost", "The worker stopped renewing its lease"
    way_out = "Nothing to do: the job is taken over."


class AttemptKilled(PlatformError):
    code, title = "attempt_killed", "The attempt's process was killed"
    way_out = "If it repeats, look for the kernel's out-of-memory killer."


class AttemptSuperseded(PlatformError):
    code, title, retry = "attempt_superseded", "Another attempt holds the job", Retry.NEVER
    way_out = "Nothing to do: the newer attempt goes on."


class CudaError(PlatformError):
    code, title = "cuda_error", "The GPU reported a fault"
    way_out = "If it repeats, look at the driver's log; the message names the fault."


class StorageError(PlatformError):
    code, title = "storage_error", "An artifact could not be stored or read"
    way_out = "Check the blob store's disk or bucket."


class Unavailable(PlatformError):
    code, title, status = "unavailable", "The service is not available now", 503
    way_out = "Wait for `Retry-After` seconds; `/readyz` says what is missing."


class HubRateLimited(Unavailable):
    code, title = "hub_rate_limited", "The Hub limits the requests of this address"
    way_out = "The job is tried again by itself; with `BITWRIGHT_HUB_TOKEN` the Hub allows more."


class InternalError(PlatformError):
    code, title = "internal_error", "Internal error"
    way_out = "A defect: report it with the request's or the job's id; the log under that id has the cause."


def _tree(root: type[BitwrightError]) -> dict[str, type[BitwrightError]]:
    classes = {root.code: root}
    for child in root.__subclasses__():
        classes |= _tree(child)
    return classes


ERRORS: dict[str, type[BitwrightError]] = _tree(BitwrightError)
"""Every error class by its code. A test holds that codes are unique."""


def error_from_code(code: str, detail: str, **fields: str | None) -> BitwrightError:
    """The error that a process reported by code; an unknown code becomes `InternalError`."""
    return ERRORS.get(code, InternalError)(detail, **fields)  # type: ignore[arg-type]
