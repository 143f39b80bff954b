"""Requests near another one that give a smaller, a quicker or a nearer result: one step of width, or of effort."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.domain.methods import MAX_BITS, METHODS, MIN_BITS
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest

Why = Literal["smaller", "quicker", "nearer"]
PLAIN = "rtn"
"""The method that computes nothing but what is stored."""


@dataclass(frozen=True)
class Alternative:
    """A request that differs in a few fields.

    changes   of `quantization`, by name
    """

    why: Why
    changes: Mapping[str, Any]
    request: JobRequest


def alternatives(request: JobRequest) -> list[Alternative]:
    """At most one that is smaller, one that is quicker and one that is nearer, each a valid request.

    None of a job that starts from another one's result, nor of one that does not say bits.
    """
    if request.base_job is not None:
        return []
    found: dict[Why, Alternative] = {}
    for why, changes in _steps(request):
        if why not in found and (made := _changed(request, changes)) is not None:
            found[why] = Alternative(why, changes, made)
    return list(found.values())


def _steps(request: JobRequest) -> Iterator[tuple[Why, dict[str, Any]]]:
    """Changes to try, for each aim the smallest step first."""
    spec, fields = request.quantization, request.quantization.model_dump()
    bits = spec.bits if isinstance(spec.bits, int) and fields.get("scheme") is None and spec.goal() is None else None
    if bits is not None:
        for fewer in range(bits - 1, MIN_BITS - 1, -1):
            yield "smaller", {"bits": fewer}
    # What takes minutes is nobody's next step.
    presets = [name for name in METHODS[spec.method].presets if name != "max"]
    at = presets.index(fields["preset"]) if fields.get("preset") in presets else None
    if at is not None and at > 0:
        yield "quicker", {"preset": presets[at - 1]}
    if spec.method != PLAIN:
        yield "quicker", {"method": PLAIN}
    if at is not None and at + 1 < len(presets):
        yield "nearer", {"preset": presets[at + 1]}
    if bits is not None:
        for more in range(bits + 1, MAX_BITS + 1):
            yield "nearer", {"bits": more}


def _changed(request: JobRequest, changes: Mapping[str, Any]) -> JobRequest | None:
    """The request with other fields of `quantization`; None if it is not valid, its formats among others."""
    body = request.model_dump(mode="json")
    spec = {name: value for name, value in body["quantization"].items() if value is not None}
    if "preset" in changes:
        filled = {name for preset in METHODS[spec["method"]].presets.values() for name in preset.spec}
        spec = {name: value for name, value in spec.items() if name not in filled}
    if "method" in changes:
        fields = METHODS[changes["method"]].spec.model_fields
        spec = {name: value for name, value in spec.items() if name in fields}
    body["quantization"] = {**spec, **changes}
    try:
        return JobRequest.parse(body)
    except InvalidRequest:
        return None
