"""Pages for a browser: where to begin, and the API's documentation. All that they load comes from this service."""

import base64
import hashlib
import html
import re
from importlib.metadata import version
from importlib.resources import as_file, files
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from bitwright.errors import NotFound

router = APIRouter(include_in_schema=False)

ASSETS_PATH = "/docs/assets"
ASSETS = MappingProxyType(
    {
        "swagger-ui-bundle.js": "text/javascript",
        "swagger-ui.css": "text/css",
        "redoc.standalone.js": "text/javascript",
        "favicon.png": "image/png",
    }
)
"""Files that the pages load, of the package that brings Swagger UI and ReDoc, by media type."""
PACKAGE, STATIC = "fastapi_offline", "static"
ASSET_CACHE = "public, max-age=3600"

LINKS = MappingProxyType(
    {
        "docs": ("/docs", "The API, to read and to try"),
        "redoc": ("/redoc", "The API, to read"),
        "openapi": ("/openapi.json", "The API as an OpenAPI document"),
        "jobs": ("/v1/jobs", "Jobs; needs a key, as all of /v1 does"),
        "methods": ("/v1/methods", "Methods, adapters and recipes"),
        "formats": ("/v1/formats", "Formats, and the runtimes that load them"),
        "workers": ("/v1/workers", "Who computes"),
        "ready": ("/readyz", "Whether the service can take requests"),
    }
)


@router.get("/")
def begin(request: Request) -> Response:
    """The service, and links to what it has: a page for a browser, JSON for others."""
    root, vary = _root(request), {"Vary": "Accept"}
    if "text/html" not in request.headers.get("accept", ""):
        links = {name: f"{root}{path}" for name, (path, _) in LINKS.items()}
        return JSONResponse({"name": "Bitwright", "version": version("bitwright"), "links": links}, headers=vary)
    rows = "\n".join(
        f'<li><a href="{html.escape(root + path)}">{html.escape(path)}</a>: {html.escape(what)}</li>'
        for path, what in LINKS.values()
    )
    return HTMLResponse(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Bitwright</title></head>\n'
        f"<body><h1>Bitwright {html.escape(version('bitwright'))}</h1>\n<p>Quantization as a service.</p>\n"
        f"<ul>\n{rows}\n</ul></body></html>\n",
        headers=vary,
    )


@router.get("/docs")
def swagger_page(request: Request) -> Response:
    """The API in Swagger UI."""
    assets = _root(request) + ASSETS_PATH
    page = get_swagger_ui_html(
        openapi_url=f"{_root(request)}/openapi.json",
        title="Bitwright: API",
        swagger_js_url=f"{assets}/swagger-ui-bundle.js",
        swagger_css_url=f"{assets}/swagger-ui.css",
        swagger_favicon_url=f"{assets}/favicon.png",
    )
    return _guarded(page)


@router.get("/redoc")
def redoc_page(request: Request) -> Response:
    """The API in ReDoc."""
    assets = _root(request) + ASSETS_PATH
    page = get_redoc_html(
        openapi_url=f"{_root(request)}/openapi.json",
        title="Bitwright: API",
        redoc_js_url=f"{assets}/redoc.standalone.js",
        redoc_favicon_url=f"{assets}/favicon.png",
        with_google_fonts=False,
    )
    return _guarded(page)


@router.get(ASSETS_PATH + "/{name}")
def asset(name: str) -> Response:
    """A script, style or image of the pages."""
    if name not in ASSETS:
        raise NotFound(f"there is no asset {name[:64]!r}", value=name, hint=f"there are: {', '.join(ASSETS)}")
    with as_file(files(PACKAGE) / STATIC / name) as path:
        return FileResponse(path, media_type=ASSETS[name], headers={"Cache-Control": ASSET_CACHE})


def _root(request: Request) -> str:
    """The prefix under which a proxy shows the service."""
    root: Any = request.scope.get("root_path", "")
    return str(root).rstrip("/")


def _guarded(page: HTMLResponse) -> Response:
    """The page with a policy that lets nothing in from elsewhere: its own inline script is named by its hash."""
    text = bytes(page.body).decode()
    hashes = [hashlib.sha256(script.encode()).digest() for script in re.findall(r"<script>(.*?)</script>", text, re.S)]
    scripts = " ".join(["'self'", *(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)])
    policy = {
        "default-src": "'none'",
        "script-src": scripts,
        "style-src": "'self' 'unsafe-inline'",  # both write styles into the page
        "img-src": "'self' data:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "worker-src": "'self' blob:",  # ReDoc's search
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    page.headers["Content-Security-Policy"] = "; ".join(f"{name} {value}" for name, value in policy.items())
    return page
