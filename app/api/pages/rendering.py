"""Pages from templates: what all of them share, their policy, and assets under names that change with their bytes.

Every text is escaped by Jinja. The policy lets scripts, styles and images in from this service alone, none inline.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from app.report_page.figures import bytes_in_words, seconds_in_words
from app.report_page.page import visible

ASSETS: Mapping[str, str] = MappingProxyType(
    {
        "pages.css": "text/css",
        "pages.js": "text/javascript",
        "uPlot.iife.min.js": "text/javascript",
        "uPlot.min.css": "text/css",
        "icon.svg": "image/svg+xml",
    }
)
"""Files that pages load, by media type."""
HASH_LENGTH = 16
FOREVER = "public, max-age=31536000, immutable"
"""An asset's address has its hash: under it there are never other bytes."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind} 'self'" for kind in ("script-src", "style-src", "connect-src", "form-action", "frame-src")),
        "img-src 'self' data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    # Not no-referrer, as elsewhere: browsers would then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Vary": "Accept, Cookie",
}
MINUTE, HOUR, DAY = 60, 3600, 86_400


def page(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
) -> Response:
    """The page of a template; `values` are its own."""
    text = (
        _environment()
        .get_template(f"{template}.jinja")
        .render(root=root_of(request), path=path_of(request), version=version("bitwright"), **values)
    )
    return HTMLResponse(text, status_code=status, headers={**HEADERS, **(headers or {})})


def root_of(request: Request) -> str:
    """The prefix under which a proxy shows the service."""
    root: Any = request.scope.get("root_path", "")
    return str(root).rstrip("/")


def path_of(request: Request) -> str:
    """The path of a page, without that prefix."""
    path, root = str(request.scope["path"]), root_of(request)
    return (path.removeprefix(root) or "/") if path == root or path.startswith(f"{root}/") else path


def asset_bytes(name: str) -> bytes:
    """The content of an asset."""
    return _static(name)


def asset_hash(name: str) -> str:
    """The part of an asset's address that changes with its bytes."""
    return hashlib.sha256(_static(name)).hexdigest()[:HASH_LENGTH]


@cache
def _static(name: str) -> bytes:
    return (files(__package__) / "static" / name).read_bytes()


@cache
def _asset_path(name: str) -> str:
    return f"/assets/{asset_hash(name)}/{name}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_in_words, "seconds": seconds_in_words, "ago": ago, "moment": moment}
    environment.globals["asset"] = _asset_path
    return environment


def moment(time: datetime) -> str:
    """A time as people write it, UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def ago(time: datetime) -> str:
    """The time since then, in its largest unit."""
    seconds = max(0.0, (datetime.now(UTC) - time).total_seconds())
    for unit, name in ((DAY, "day"), (HOUR, "hour"), (MINUTE, "minute")):
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now" if seconds < 5 else f"{int(seconds)} seconds ago"
