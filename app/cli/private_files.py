"""Privacy of the data folder: what it holds are tenants' models and texts, keys and addresses."""

import os
import stat
from pathlib import Path

import structlog

from app.settings import Settings
from app.store.blobs import blob_folder
from bitwright.errors import Conflict

log = structlog.get_logger(__name__)

OTHERS = stat.S_IRWXO
GROUP = stat.S_IRWXG
SECRET_FILES = ("bitwright.db*", "client.json*", "serve.log", "serve.lock")


def keep_private(settings: Settings) -> None:
    """Make the data folder where it is missing, and close to other users what is in it already.

    New files are private from here on, in this process and those that it starts. Folders that a group was given stay
    open to it: a web server may send blobs. The data folder itself is left as it is, since it may be a home.

    Raises:
        Conflict: what is open to others belongs to somebody else, or everybody may replace what is in the folder.
    """
    os.umask(OTHERS | GROUP)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    mode = settings.data_dir.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        detail = f"every user may replace files in the data folder {settings.data_dir}"
        raise Conflict(
            detail, value=str(settings.data_dir), hint=f"chmod o-w {settings.data_dir}, or choose another one"
        )
    folders = [settings.upload_dir, settings.workspace_dir, settings.hub_dir, blob_folder(settings.blob_url)]
    for folder in folders:
        if folder is not None and folder.is_dir():
            _close(folder, OTHERS)
    for pattern in SECRET_FILES:
        for file in settings.data_dir.glob(pattern):
            _close(file, OTHERS | GROUP)


def _close(path: Path, to: int) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return
    if not mode & to:
        return
    try:
        path.chmod(mode & ~to)
    except PermissionError as error:
        detail = f"{path} is open to other users (mode {mode:o}), and another user's to close"
        raise Conflict(detail, value=str(path), hint=f"chmod {mode & ~to:o} {path}, as its owner") from error
    log.warning("closed_to_other_users", path=str(path), mode_before=f"{mode:o}")
