"""Mistakes written by hand, one per entry of the TOML files in `listed/`.

[[mistake]]
id = "N02"
file = "workers/numerics/affine.py"
old = '''text of the file, there once'''
new = '''what stands there instead'''
damage = "what it would do to a user"
tests = ["tests/numerics/test_affine.py"]    # where it is noticed
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.documentation import ROOT

LISTED = Path(__file__).parent / "listed"


@dataclass(frozen=True)
class Mistake:
    """A mistake, by the text that it replaces. `tests` are files or ids of pytest, from the root."""

    id: str
    file: str
    old: str
    new: str
    damage: str
    tests: tuple[str, ...]

    def text(self) -> str:
        """The file with the mistake.

        Raises:
            ValueError: the old text does not stand in the file exactly once.
        """
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if (times := source.count(self.old)) != 1:
            raise ValueError(f"{self.id}: {self.file} has its old text {times} times:\n{self.old}")
        return source.replace(self.old, self.new)


def listed() -> list[Mistake]:
    """All mistakes, by file of the list and by place in it."""
    return [
        Mistake(**{**entry, "tests": tuple(entry["tests"])})
        for path in sorted(LISTED.glob("*.toml"))
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mistake"]
    ]
