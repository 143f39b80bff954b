"""The client's part of the environment: where the service is, the key for it, and the user's data folder."""

import os
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8080"


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/bitwright`, or `~/.local/share/bitwright`."""
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(root).expanduser() / "bitwright"


def data_dir() -> Path:
    """`$BITWRIGHT_DATA_DIR`, or the user's default data folder."""
    given = os.environ.get("BITWRIGHT_DATA_DIR")
    return Path(given).expanduser() if given else default_data_dir()


def service_url() -> str | None:
    """`$BITWRIGHT_URL`; None where it is unset or empty."""
    return os.environ.get("BITWRIGHT_URL") or None


def api_key() -> str | None:
    """`$BITWRIGHT_KEY`; None where it is unset or empty."""
    return os.environ.get("BITWRIGHT_KEY") or None
