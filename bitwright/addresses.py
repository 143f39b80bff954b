"""Addresses as people write them: checked, and shown without their secrets.

Each check raises ValueError with the problem and a way out. The message does not name the variable; the caller does.
"""

import ipaddress
import re
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import SecretStr

LONGEST_SHOWN = 120
LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def shown(value: object) -> str:
    """A setting's value for display: without user, password and query, at most one line."""
    if isinstance(value, SecretStr):
        return "***"
    text = re.sub(r"\?.*", "?***", str(value), flags=re.DOTALL)
    before, at, after = text.rpartition("@")
    if at:
        scheme, mark, _ = before.partition("://")
        text = f"{scheme}://***@{after}" if mark else f"***@{after}"
    text = repr(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def web_address(value: str) -> str:
    """An http or https URL with a host, without a trailing slash."""
    way = "give https://host, with a port or path where it has one"
    parts = split_address(value, way)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{scheme_of(parts)} is no address of a web service; {way}")
    check_host(parts, way)
    if parts.query or parts.fragment:
        raise ValueError(f"it ends with its path; {way}")
    return value.rstrip("/")


def split_address(value: str, way: str) -> SplitResult:
    """The parts of a URL; `way` ends each message."""
    if re.search(r"[\s\0]", value):
        raise ValueError(f"an address has no blanks or line ends; {way}")
    if "://" not in value:
        raise ValueError(f"this is no address: the scheme and :// are missing; {way}")
    try:
        parts = urlsplit(value)
    except ValueError as error:
        raise ValueError(f"this is no address ({error}); {way}") from error
    if parts.fragment or "#" in value:
        raise ValueError(f"write # as %23, in a password too; {way}")
    return parts


def check_host(parts: SplitResult, way: str, *, needed: bool = True) -> None:
    """Refuse a missing or malformed host, and an invalid port."""
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(
            f"the port must be a number from 1 to 65535, and / in a password is written %2F; {way}"
        ) from error
    if port == 0:
        raise ValueError(f"the port must be a number from 1 to 65535; {way}")
    if host is None and not needed:
        return
    if host is None or not is_host(unquote(host)):
        raise ValueError(f"the host is missing or none; {way}")


def is_host(text: str) -> bool:
    """True if the text is an IP address or a host name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.removesuffix(".").split(".")
        # All digits: a mistyped address; no host name looks like that.
        number = all(label.isdigit() for label in labels)
        return len(text) <= 253 and not number and all(LABEL.fullmatch(label) for label in labels)
    return True


def scheme_of(parts: SplitResult) -> str:
    """The scheme as it was written, with its `://`."""
    return f"{parts.scheme}://"
