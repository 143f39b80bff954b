"""A value for all that a process is made of: one that was started with another stamp is of yesterday."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The folder of the packages `app`, `bitwright` and `workers`."""
PACKAGES = ("app", "bitwright", "workers")
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "numba", "llvmlite"),
    *("compressed-tensors", "pydantic"),
)
DRIVER = Path("/proc/driver/nvidia/version")


def stamp(environment: Mapping[str, str], root: Path = ROOT, driver: Path = DRIVER) -> str:
    """sha256 of sources (by time and size), library versions, the GPU's driver and a process's variables."""
    digest = hashlib.sha256()
    for line in (*_sources(root), *_versions(), _text(driver), *(f"{n}={v}" for n, v in sorted(environment.items()))):
        digest.update(line.encode(errors="replace") + b"\0")
    return digest.hexdigest()


def _sources(root: Path) -> list[str]:
    """A line for each file of Python below the packages."""
    return sorted(line for package in PACKAGES for line in _of_folder(root / package))


def _of_folder(folder: Path) -> Iterator[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__":
                yield from _of_folder(Path(entry.path))
        elif entry.name.endswith(".py"):
            try:
                found = entry.stat()
            except OSError:
                continue
            yield f"{entry.path} {found.st_size} {found.st_mtime_ns}"


def _versions() -> Iterator[str]:
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
