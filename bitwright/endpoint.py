"""The service and key that a client uses, from arguments, the environment or `client.json`.

`bitwright serve` leaves its address and a key in `client.json` of its data folder, readable by this user alone.
BITWRIGHT_URL and BITWRIGHT_KEY take precedence.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bitwright.addresses import shown, web_address
from bitwright.errors import InvalidSettings

FILE_NAME = "client.json"
DEFAULT_URL = "http://127.0.0.1:8080"


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/bitwright`, or `~/.local/share/bitwright`."""
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(root).expanduser() / "bitwright"


def user_data_dir() -> Path:
    """`$BITWRIGHT_DATA_DIR`, or the user's default data folder."""
    given = os.environ.get("BITWRIGHT_DATA_DIR")
    return Path(given).expanduser() if given else default_data_dir()


def service_url() -> str | None:
    """`$BITWRIGHT_URL`; None where it is unset or empty."""
    return os.environ.get("BITWRIGHT_URL") or None


def api_key() -> str | None:
    """`$BITWRIGHT_KEY`; None where it is unset or empty."""
    return os.environ.get("BITWRIGHT_KEY") or None


@dataclass(frozen=True)
class Endpoint:
    """Address of a service and the key for it. `pid` is the `serve` process that wrote it."""

    url: str
    key: str | None = None
    pid: int | None = None


def save_endpoint(data_dir: Path, endpoint: Endpoint) -> Path:
    """Write `client.json` with mode 0600, replacing an older one in one step."""
    path = data_dir / FILE_NAME
    fresh = path.with_suffix(f".{os.getpid()}.new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump(asdict(endpoint), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    return path


def load_endpoint(data_dir: Path) -> Endpoint | None:
    """The endpoint that the last `serve` on this data folder wrote; None if there is nothing readable."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((data_dir / FILE_NAME).read_text(encoding="utf-8"))
        return Endpoint(url=stored["url"], key=stored.get("key"), pid=stored.get("pid"))
    return None


def find_endpoint(url: str | None, key: str | None, data_dir: Path | None) -> Endpoint:
    """The service that flags and variables name, else the embedded one of the data folder.

    A stored key goes only to the address that it was stored with.
    """
    stored = load_endpoint(data_dir.expanduser() if data_dir else user_data_dir())
    if url is not None:
        url = _checked(url)
    elif stored is not None:
        url = stored.url
    else:
        url = DEFAULT_URL
    if key is None and stored is not None and stored.url.rstrip("/") == url.rstrip("/"):
        key = stored.key
    return Endpoint(url=url, key=key)


def _checked(url: str) -> str:
    """The service's address, if it is one.

    Raises:
        InvalidSettings: it is not; the message shows a valid one.
    """
    try:
        return web_address(url)
    except ValueError as error:
        detail = f"BITWRIGHT_URL or --url is {shown(url)}: {error}"
        raise InvalidSettings(detail, field="url", value=shown(url), hint="e.g. http://127.0.0.1:8080") from None
