"""Names of this repository in backticks, in docstrings, comments and documents: each resolves."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("app", "bitwright", "workers", "migrations")
TEXTS = sorted(
    path
    for folder in (*PACKAGES, "tests", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md"}
)
TEXTS += sorted(ROOT.glob("*.md"))
REFERENCE = re.compile(r"`((?:app|workers|bitwright)(?:\.\w+)+)(?:\(\))?`")
SOURCE_FILE = re.compile(r"`((?:app|workers|bitwright|tests|benchmarks|migrations)/[\w/]+\.py)`")
FILE_NAMES = frozenset({"json", "toml"})
"""Last parts of names of files, such as bitwright.json."""
ENTRY_POINTS = frozenset({"bitwright.commands"})
"""Groups of entry points, which are no modules."""


def references(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """File with line, and the name that it refers to."""
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            yield from ((f"{path.relative_to(ROOT)}:{number}", match[1]) for match in pattern.finditer(line))


def resolves(name: str) -> bool:
    """True for a package, a module, and a name that a module or a class in it binds."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        if (rest := parts[count:]) == [] and place.is_dir():
            return True
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return not rest or _binds(_tree(file).body, rest)
    return False


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _binds(body: list[ast.stmt], names: list[str]) -> bool:
    for statement in body:
        if isinstance(statement, ast.ClassDef) and statement.name == names[0] and names[1:]:
            return _binds(statement.body, names[1:])
        if names[0] in _bound(statement) and not names[1:]:
            return True
    return False


def _bound(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Import() | ast.ImportFrom():
            return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        case ast.Assign() | ast.AnnAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def test_every_name_in_backticks_resolves() -> None:
    names = [(place, name) for place, name in references(REFERENCE) if name.split(".")[-1] not in FILE_NAMES]
    assert len(names) > 50
    assert [f"{place} {name}" for place, name in names if name not in ENTRY_POINTS and not resolves(name)] == []


def test_every_source_file_in_backticks_exists() -> None:
    assert [f"{place} {name}" for place, name in references(SOURCE_FILE) if not (ROOT / name).is_file()] == []


def test_what_is_not_there_does_not_resolve() -> None:
    assert resolves("app.store.session.Database.transaction")
    assert resolves("workers.contracts")
    assert not resolves("workers.engine.nowhere")
    assert not resolves("app.store.session.Database.nowhere")
