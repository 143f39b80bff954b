"""Mistakes drawn at random from cosmic-ray's operators.

An operator offers one mutant per replacement: `a + b` has eleven. So that sums do not outnumber everything else, a
place (file, position, kind of operator) is drawn first and one of its replacements after.
"""

import ast
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.documentation import ROOT

FOLDERS = (
    "workers/numerics",
    "workers/methods",
    "workers/adapters",
    "app/domain",
    "app/store",
    "workers/supervise",
)

KINDS = ("ReplaceBinaryOperator", "ReplaceComparisonOperator", "ReplaceUnaryOperator")
"""Operators with a variant per replacement: what is replaced is the kind."""

SKIPPED = ("VariableReplacer", "VariableInserter", "ExceptionReplacer")
"""Operators that need arguments, or that make an `except` catch nothing that exists."""


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    file       from the root of the repository
    lines      first and last line of the place
    operator   cosmic-ray's name, and the occurrence of it in the file
    text       the file with the mistake
    """

    file: str
    lines: tuple[int, int]
    operator: str
    occurrence: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.lines[0]} {self.operator}#{self.occurrence}"

    def shown(self) -> str:
        """File and changed lines, before and after, without numbers of lines: it stays the same while others move."""
        before, after = (ROOT / self.file).read_text(encoding="utf-8").splitlines(), self.text.splitlines()
        changed = list(unified_diff(before, after, n=0, lineterm=""))[3:]
        return f"{self.file}: " + "  ".join(f"{line[0]} {line[1:].strip()}" for line in changed)


@dataclass(frozen=True, order=True)
class Place:
    """What may be replaced: the kind of operator, and the file's lines and columns from `start` to `end`."""

    file: str
    start: tuple[int, int]
    end: tuple[int, int]
    kind: str


def draw(folder: str, seed: int) -> Iterator[Mutant]:
    """All places of a folder in an order that the seed gives, one mistake at each."""
    chance = random.Random(f"{seed} {folder}")
    places: defaultdict[Place, list[tuple[str, int]]] = defaultdict(list)
    for path in sorted((ROOT / folder).rglob("*.py")):
        for place, operator, occurrence in candidates(path):
            places[place].append((operator, occurrence))
    order = sorted(places)
    chance.shuffle(order)
    for place in order:
        operator, occurrence = chance.choice(places[place])
        source = (ROOT / place.file).read_text(encoding="utf-8")
        text = mutate_code(source, get_operator(operator)(), occurrence)
        if text is not None and compiles(text) and ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)):
            yield Mutant(place.file, (place.start[0], place.end[0]), operator, occurrence, text)


def candidates(path: Path) -> Iterator[tuple[Place, str, int]]:
    """Place, operator and occurrence of every mutation of a file, those of annotations left out."""
    source = path.read_text(encoding="utf-8")
    nodes, annotations = list(ast_nodes(get_ast(source))), list(annotation_spans(source))
    file = path.relative_to(ROOT).as_posix()
    for name in operator_names():
        if name.endswith(SKIPPED):
            continue
        operator = get_operator(name)()
        positions = [span for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            if not any(first <= start < last for first, last in annotations):
                yield Place(file, start, end, kind(name)), name, occurrence


def kind(operator: str) -> str:
    """What an operator replaces: `core/ReplaceBinaryOperator_Add_Sub` replaces sums."""
    name = operator.removeprefix("core/")
    return name.rpartition("_")[0] if name.startswith(KINDS) else name


def annotation_spans(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end of every annotation: `int | None` there is no computation."""
    for node in ast.walk(ast.parse(source)):
        for item in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(item, ast.expr):
                assert item.end_lineno is not None
                assert item.end_col_offset is not None
                yield (item.lineno, item.col_offset), (item.end_lineno, item.end_col_offset)


def compiles(text: str) -> bool:
    """True if Python parses it."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
