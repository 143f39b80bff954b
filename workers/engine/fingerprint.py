"""Fingerprints of everything that decides a job's codes."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the packages `app`, `bitwright` and `workers`."""


CODE = ("workers", "app/domain", "bitwright")
"""Folders whose files decide codes, with all folders in them."""


SUPERVISION = (
    "workers/supervise/",
    "workers/__main__.py",
    "workers/sweep.py",
    "workers/child/fetch.py",
    "workers/child/publish.py",
    "workers/child/examination.py",
    "workers/disk/hub_cache.py",
)
"""Files of `CODE` that no attempt loads: a change of them keeps the finished blocks of a job that is tried again."""


LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "triton")
"""Distributions whose code takes part in making codes: blocks, tokens and kernels are theirs."""


def fingerprint(parts: Mapping[str, object]) -> str:
    """sha256 of everything that decides the codes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def library_versions() -> Mapping[str, str | None]:
    """The versions of the libraries that compute codes; None for one that is not installed."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def code_version() -> str:
    """sha256 of this program's sources that can change codes, read once: a process runs what it has loaded."""
    return digest_of(ROOT)


def digest_of(root: Path) -> str:
    """sha256 of the sources under `root` that can change codes, each with its path."""
    digest = hashlib.sha256()
    for file in code_files(root):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def code_files(root: Path = ROOT) -> list[Path]:
    """The files under `root` that can change codes: the workers' but those of supervision, and the domain's.

    A file that nobody thought of is among them: to start over costs time, to mix two versions costs the result.
    """
    files = (path for folder in CODE for path in (root / folder).rglob("*"))
    return sorted(path for path in files if path.is_file() and _counts(path.relative_to(root)))


def _counts(path: Path) -> bool:
    hidden = any(name == "__pycache__" or name.startswith(".") or name.endswith(".egg-info") for name in path.parts)
    return not hidden and not path.as_posix().startswith(SUPERVISION)
