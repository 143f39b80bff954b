"""`RateLimit` and `RateLimit-Policy`: what a tenant may have and has left, as draft-ietf-httpapi-ratelimit-headers-11
writes them.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import QuotaExceeded

SCOPE_KEY = "bitwright.limits"


@dataclass(frozen=True)
class Limit:
    """A quota and what is left of it.

    unit             of quota and remaining; None: requests
    window_seconds   that the quota is for; None: it has no window
    reset_seconds    until the window ends
    """

    policy: str
    quota: int
    remaining: int
    unit: str | None = None
    window_seconds: int | None = None
    reset_seconds: int | None = None


def tell_limit(scope: MutableMapping[str, Any], limit: Limit) -> None:
    """Let the answer to this request tell of a limit, in place of an earlier one of the same policy."""
    scope.setdefault(SCOPE_KEY, {})[limit.policy] = limit


def limit_of(error: QuotaExceeded) -> Limit | None:
    """The limit that a refusal is about; None if it does not know its quota."""
    if error.quota is None:
        return None
    return Limit(
        policy=error.policy,
        quota=error.quota,
        remaining=0,
        unit=error.unit,
        window_seconds=error.window_seconds,
        reset_seconds=error.retry_after_seconds if error.window_seconds else None,
    )


def limit_headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    """Headers of all limits that this request met; none if it met none."""
    limits: list[Limit] = list(scope.get(SCOPE_KEY, {}).values())
    if not limits:
        return {}
    return {
        "RateLimit-Policy": ", ".join(map(_policy_item, limits)),
        "RateLimit": ", ".join(map(_limit_item, limits)),
    }


def _policy_item(limit: Limit) -> str:
    unit = f';qu="{limit.unit}"' if limit.unit else ""
    window = f";w={limit.window_seconds}" if limit.window_seconds else ""
    return f'"{limit.policy}";q={limit.quota}{unit}{window}'


def _limit_item(limit: Limit) -> str:
    reset = "" if limit.reset_seconds is None else f";t={limit.reset_seconds}"
    return f'"{limit.policy}";r={limit.remaining}{reset}'
