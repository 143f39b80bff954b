"""The configured folders under which local models and texts may lie, every link followed."""

import os
from collections.abc import Iterable
from pathlib import Path

from bitwright.errors import SourceForbidden

ALLOWED_HINT = (
    "local paths are read under the operator's folders alone: `bitwright serve --model-root FOLDER` names one "
    "(BITWRIGHT_MODEL_ROOTS); or send the files with `bitwright upload` and name the id that it prints"
)


def lies_under(path: str | Path, roots: Iterable[Path]) -> bool:
    """True if the path, with every link and `..` resolved, is one of the roots or lies under one."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, base]) == base for base in map(os.path.realpath, roots))


def check_links(folder: Path, roots: tuple[Path, ...]) -> None:
    """Refuse a model's folder with a link out of the roots. Links among the roots are fine: a Hub cache has many.

    It looks at the folder and at the folders in it; nothing that reads a model goes deeper.

    Raises:
        SourceForbidden: names the first such link.
    """
    for entry in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if not lies_under(entry, roots):
            name = entry.relative_to(folder).as_posix()
            detail = f"{name} is a link out of the allowed folders"
            raise SourceForbidden(detail, field="model.path", value=name, hint=ALLOWED_HINT)


def roots_of(roots: Iterable[Path], own: Iterable[str] | None) -> tuple[Path, ...]:
    """Folders that a tenant may read: its own that lie under the service's `roots`; None: all of those."""
    allowed = tuple(roots)
    if own is None:
        return allowed
    return tuple(path for path in map(Path, own) if path.is_absolute() and lies_under(path, allowed))
