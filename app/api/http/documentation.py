"""Additions to the OpenAPI document that the code does not state: problem responses, headers, examples."""

from typing import Any

from app.api.http.errors import MEDIA_TYPE
from app.api.openai.errors import is_openais
from app.api.openai.request import FineTuningRequest
from app.domain.request.job_request import JobRequest
from bitwright.errors import ERRORS, QuotaExceeded, RequestError
from bitwright.views import Problem

ALWAYS = ("unauthenticated", "missing_scope", "malformed_body", "invalid_request", "unavailable", "internal_error")
"""Codes that any route with a key may answer with."""

DESCRIPTION = """\
Submit a language model, a method and a width; a worker calibrates and quantizes it; follow the events; download a
checkpoint that simply loads.

* Every route under `/v1` needs `Authorization: Bearer bw_…`.
* Errors are RFC 9457 problem documents; programs look at `code`, `errors` lists every problem of a request at once.
* Lists are pages: give a page's `next_cursor` as `after` to get the next one.
* Times are UTC, RFC 3339. Ids are prefixed and sort by time.
"""

TAGS = [
    {"name": "jobs", "description": "Submit, list, cancel, retry and delete jobs."},
    {"name": "events", "description": "What a job tells while it runs."},
    {"name": "artifacts", "description": "The files that a job made."},
    {"name": "uploads", "description": "Send a checkpoint or a text in parts."},
    {"name": "hub", "description": "Finished jobs as repositories, for clients of a Hub with `HF_ENDPOINT`."},
    {"name": "openai", "description": "Files and finetuning jobs for OpenAI's clients, whose errors have its shape."},
    {"name": "webhooks", "description": "Addresses that are called when jobs come into a state."},
    {"name": "catalogue", "description": "What there is: methods, formats, workers."},
    {"name": "admin", "description": "For operators: tenants, their keys, quotas, use and the audit log."},
    {"name": "health", "description": "For orchestrators and monitoring."},
]

IN_PATHS = {
    "job_id": "Id of a job, `job_...`.",
    "artifact_id": "Id of an artifact, `art_...`: the list of a job's artifacts has it.",
    "upload_id": "Id of an upload, `upl_...`.",
    "file_id": "Id of a file, as the answer to its upload has it.",
    "name": "Name of a file, as the upload was announced with it.",
    "webhook_id": "Id of an endpoint, `whe_...`.",
    "delivery_id": "Id of a delivery, `whd_...`.",
    "tenant_id": "Id of a tenant, `tnt_...`.",
    "key_id": "Id of a key, `key_...`: never the key itself.",
    "namespace": "`jobs`, or the organization of a job's name.",
    "repository": "Id of a job or its name, without the organization.",
    "revision": "`main`, a branch named by a format, or a commit.",
    "folder": "Folder of the repository.",
    "path": "Path of a file in the repository.",
}
"""Parameters in paths: each name means one thing."""


def problems(*codes: str, public: bool = False) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these error codes and, unless the route is `public`, those that every route has."""
    by_status: dict[int, list[str]] = {}
    for code in (*codes, *(() if public else ALWAYS)):
        by_status.setdefault(ERRORS[code].status, []).append(code)
    return {status: _problem(status, errors) for status, errors in sorted(by_status.items())}


def complete_document(document: dict[str, Any]) -> dict[str, Any]:
    """Add the schemas that only descriptions refer to, and what any POST may be answered with."""
    schemas = document["components"]["schemas"]
    for model in (Problem, JobRequest, FineTuningRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {name: definition for name, definition in schema.pop("$defs", {}).items() if name not in schemas}
        schemas.setdefault(model.__name__, schema)
    for path, item in document["paths"].items():
        if path.startswith("/v1/") and "post" in item:
            # Counted before the route is reached, whichever it is.
            item["post"]["responses"].setdefault("429", _problem(429, ["rate_limit_exceeded"]))
        for operation in item.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter.setdefault("description", IN_PATHS.get(parameter["name"], ""))
        if is_openais(path):
            for operation in item.values():
                operation["responses"].pop("422", None)  # the framework's own: here such a request is answered with 400
    return document


def _problem(status: int, codes: list[str]) -> dict[str, Any]:
    lines = "; ".join(f"`{code}`: {ERRORS[code].title}" for code in codes)
    examples = {code: {"summary": ERRORS[code].title, "value": _example(status, code)} for code in codes}
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    response: dict[str, Any] = {"description": lines, "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}}}
    if status in (429, 503):
        response["headers"] = {"Retry-After": text_header("Seconds to wait.", "integer")}
    if any(issubclass(ERRORS[code], QuotaExceeded) for code in codes):
        response["headers"] |= {
            "RateLimit-Policy": text_header('Quotas that the request met, e.g. `"posts";q=60;w=60`.'),
            "RateLimit": text_header('What is left of them, e.g. `"posts";r=0;t=41`.'),
        }
    return response


def _example(status: int, code: str) -> dict[str, Any]:
    error = ERRORS[code]
    kind = "the request" if issubclass(error, RequestError) else "the service or the input"
    return {
        "type": f"urn:bitwright:problem:{code}",
        "title": error.title,
        "status": status,
        "code": code,
        "detail": f"One sentence about what is wrong with {kind}.",
        "instance": "/v1/jobs",
        "request_id": "9f86d081884c7d659a2feaa0c55ad015",
    }


def text_header(description: str, kind: str = "string") -> dict[str, Any]:
    """An OpenAPI response header."""
    return {"description": description, "schema": {"type": kind}}


def binary(description: str, *media_types: str, **headers: str) -> dict[str, Any]:
    """An OpenAPI response of raw bytes; `headers` are names, with `_` for `-`, and descriptions."""
    return {
        "description": description,
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types},
        "headers": {name.replace("_", "-"): text_header(text) for name, text in headers.items()},
    }
