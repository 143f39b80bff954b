"""Media types of a checkpoint's files, by their names."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType

TENSORS = "application/octet-stream"
MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".json": "application/json",
        ".md": "text/markdown",
        ".txt": "text/plain",
        ".jinja": "text/plain",
        ".py": "text/x-python",
    }
)
"""By suffix; of all others, `TENSORS`."""


def media_type(name: str) -> str:
    """Of a checkpoint's file, by its name; tensors are bytes."""
    return MEDIA_TYPES.get(PurePosixPath(name).suffix.lower(), TENSORS)
