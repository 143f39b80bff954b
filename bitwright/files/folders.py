"""Folders on this machine that a download may write into: new ones, empty ones, and its own unfinished ones.

A runtime loads whatever lies in a folder: two checkpoints mixed become a third one without any error.
"""

import os
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from bitwright.errors import Conflict
from bitwright.files.downloads import partial_path, sha256_of, target_path
from bitwright.views import ArtifactView

CHECKOUTS = frozenset({".git", ".hg", ".svn", ".jj"})
SERVICE_FILES = frozenset({"bitwright.db", "serve.lock", "client.json"})
"""Files that mark a service's data folder."""
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".partial")
HINT = "give a folder that is new or empty, or empty this one with --force (force=True in Python)"
GIT_SECONDS = 30
NAMED = 3
"""Names of foreign files that an error lists."""


def claim_folder(folder: Path, parts: Mapping[Path, Collection[ArtifactView]], *, force: bool) -> set[Path]:
    """Make sure that `folder` will hold nothing but this download; returns its files that are there already.

    parts   folder, `folder` itself or one below it -> the artifacts that go there
    force   empty the folder if it holds anything else

    Raises:
        Conflict: it holds other files, or it must not be emptied.
    """
    if not os.path.lexists(folder):
        return set()
    if not folder.is_dir():
        raise Conflict(f"{folder} is a file, not a folder", field="folder", value=str(folder), hint=HINT)
    wanted = {
        target_path(destination, artifact): artifact
        for destination, artifacts in parts.items()
        for artifact in artifacts
    }
    halves = {partial_path(target, artifact.sha256) for target, artifact in wanted.items()}
    there = list(files_below(folder))
    foreign = [path for path in there if path not in halves and not _is(path, wanted.get(path))]
    if not foreign:
        return {path for path in there if path in wanted}
    if force:
        empty_folder(folder)
        return set()
    names = ", ".join(str(path.relative_to(folder)) for path in foreign[:NAMED])
    more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
    detail = f"{folder} holds what is not of this download: {names}{more}; together they would load as something else"
    raise Conflict(detail, field="folder", value=str(folder), hint=HINT)


def files_below(folder: Path) -> Iterator[Path]:
    """All entries below the folder except folders, in a fixed order; links are not followed."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(Path(entry.path))
        else:
            yield Path(entry.path)


def empty_folder(folder: Path) -> None:
    """Remove every file below `folder`, and the folders that this leaves empty; `folder` itself stays.

    Nothing outside is touched: links are removed, not followed. It must look like a checkpoint, so that a mistaken
    path costs nothing.

    Raises:
        Conflict: it is not a folder that a download could have filled.
    """
    refusal = danger(folder)
    if refusal is not None:
        hint = "empty it yourself if you mean it, or give another folder"
        raise Conflict(f"{folder} is not emptied: {refusal}", field="folder", value=str(folder), hint=hint)
    for path in list(files_below(folder)):
        path.unlink()
    below = [Path(top) / name for top, names, _ in os.walk(folder, topdown=False) for name in names]
    for path in below:
        path.rmdir()


def danger(folder: Path) -> str | None:
    """The reason why `folder` must not be emptied; None if it may be."""
    real, home, here = folder.resolve(), Path.home().resolve(), Path.cwd().resolve()
    if folder.is_symlink():
        return f"it is a link to {real}"
    if real == home or real in home.parents:
        return "it is your home, or holds it"
    if real == here or real in here.parents:
        return "it is the folder that you are in, or holds it"
    if os.path.ismount(real):
        return "it is a file system of its own"
    if tracked := _tracked(real):
        return tracked
    suffixed = False
    for top, folders, files in os.walk(real):
        names = {*folders, *files}
        if held := sorted(names & CHECKOUTS):
            return f"it holds a checkout ({Path(top, held[0]).relative_to(real)})"
        if held := sorted(names & SERVICE_FILES):
            return f"it holds a service's data ({Path(top, held[0]).relative_to(real)})"
        if any(os.path.ismount(Path(top, name)) for name in folders):
            return "another file system is mounted in it"
        special = [name for name in files if not _plain(Path(top, name))]
        if special:
            return f"{Path(top, special[0]).relative_to(real)} is no ordinary file"
        near = len(Path(top).relative_to(real).parts) <= 1
        suffixed |= near and any(name.endswith(WEIGHTS) for name in files)
    return None if suffixed else "it does not look like a checkpoint: there are no weights in it"


def _tracked(real: Path) -> str | None:
    """The reason why git would miss files of this folder of a checkout; None if it tracks nothing there."""
    if not any((above / ".git").exists() for above in real.parents):
        return None
    command = ["git", "-C", str(real), "-c", "core.fsmonitor=false", "ls-files", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "it lies in a git checkout, and git does not say what it tracks there"
    return f"git tracks {listing.split(bytes(1))[0].decode(errors='replace')} in it" if listing else None


def _plain(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _is(path: Path, artifact: ArtifactView | None) -> bool:
    """True if the file is the artifact, byte for byte. A link is not: its target may change."""
    if artifact is None or path.is_symlink():
        return False
    return path.is_file() and path.stat().st_size == artifact.size and sha256_of(path) == artifact.sha256
