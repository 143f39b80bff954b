"""A resumed job never mixes two versions of the code: what can change codes is in the digest."""

import ast
import importlib.util
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from workers.engine.fingerprint import CODE, ROOT, SUPERVISION, code_files, code_version, digest_of

MODULE = re.compile(r"(app|bitwright|workers)(\.\w+)+")
DIGESTED = {path.relative_to(ROOT).as_posix() for path in code_files()}


def copied(folder: Path) -> Path:
    """A copy of the sources in a folder."""
    for part in CODE:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the sources, to be changed."""
    return copied(tmp_path)


@pytest.fixture(scope="module")
def shared_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for tests that put back what they change."""
    return copied(tmp_path_factory.mktemp("sources"))


def constants(path: Path) -> Iterator[ast.Constant]:
    """Numbers of a source file, where a change changes what is computed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.lineno == node.end_lineno:
            yield node


SOURCES = sorted(name for name in DIGESTED if name.endswith(".py"))


def numbered() -> dict[str, str]:
    """The first file with a number in it, of each folder that has one."""
    found: dict[str, str] = {}
    for name in SOURCES:
        folder = Path(name).parent.as_posix()
        if folder not in found and next(constants(ROOT / name), None) is not None:
            found[folder] = name
    return found


def change_a_constant(path: Path) -> None:
    """Another number in place of the file's first one."""
    number = next(constants(path))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    line = lines[number.lineno - 1].encode()
    changed = line[: number.col_offset] + b"13579" + line[number.end_col_offset :]
    lines[number.lineno - 1] = changed.decode()
    path.write_text("".join(lines), encoding="utf-8")


def test_the_digest_is_the_same_wherever_the_sources_lie(copy: Path) -> None:
    assert digest_of(copy) == code_version()


DECIDING = ["app/domain/methods/catalogue.py", "app/domain/methods/weight_specs.py", "workers/engine/tune/tuner.py"]
"""Files that decide grids, candidates and checks."""


@pytest.mark.parametrize("name", [*numbered().values(), *DECIDING])
def test_one_constant_of_any_package_changes_the_digest(shared_copy: Path, name: str) -> None:
    file = shared_copy / name
    before = file.read_bytes()
    change_a_constant(file)
    assert digest_of(shared_copy) != code_version()
    file.write_bytes(before)


def test_a_file_in_a_new_folder_counts_and_so_does_its_place(copy: Path) -> None:
    """Else a move of a file into a folder of its own would take it out of the digest."""
    moved = copy / "workers/engine/tune/inner/tuner.py"
    moved.parent.mkdir()
    before = digest_of(copy)
    (copy / "workers/engine/tune/tuner.py").rename(moved)
    after_the_move = digest_of(copy)
    change_a_constant(moved)
    assert len({before, after_the_move, digest_of(copy)}) == 3


def test_a_files_name_and_where_it_ends_count_where_all_else_stays(copy: Path) -> None:
    """The files stay in the same order, and so do all of their bytes."""
    before = digest_of(copy)
    (copy / "workers/methods/gptq.py").rename(copy / "workers/methods/gptq_.py")
    renamed = digest_of(copy)
    files = code_files(copy)
    first, second = next((a, b) for a, b in pairwise(files) if a.parent == b.parent and b.stat().st_size)
    head, tail = second.read_bytes()[:1], second.read_bytes()[1:]
    first.write_bytes(first.read_bytes() + head)
    second.write_bytes(tail)
    assert len({before, renamed, digest_of(copy)}) == 3


def test_two_files_that_swap_their_contents_change_it(copy: Path) -> None:
    one, other = copy / "workers/methods/gptq.py", copy / "workers/methods/awq.py"
    before, first, second = digest_of(copy), one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert digest_of(copy) != before


def test_what_python_or_an_editor_leaves_does_not_count(copy: Path) -> None:
    before = digest_of(copy)
    for name in ("workers/engine/__pycache__/tuning.cpython-311.pyc", "workers/engine/.tuning.py.swp"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x")
    (copy / "workers/sweep.py").write_text("CHANGED = 1\n")
    assert digest_of(copy) == before


def source_of(module: str) -> Path | None:
    """The file of one of our modules; None for a name that is none."""
    if module.split(".", maxsplit=1)[0] not in {"app", "bitwright", "workers"}:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def imports(module: str, path: Path) -> Iterator[str]:
    """Modules that a file may import: inside functions, by a name in a string, and the packages above them too."""
    yield module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: follow it here"
            name = node.module or ""
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            yield node.value


def reachable(*entries: str) -> set[str]:
    """Paths of all our modules that an attempt can load, by the import graph."""
    found: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        path = source_of(module) if module and module not in found else None
        if path is not None:
            found[module] = path.relative_to(ROOT).as_posix()
            waiting += imports(module, path)
    return set(found.values())


NO_CODES = frozenset({"app/__init__.py", "app/logs.py", "app/many_imports.py", "app/settings.py"})
"""Modules that an attempt loads and that decide no codes: settings, logging, how modules load, the package itself."""


LOADED_BY_NAME = [f"workers.methods.{path.stem}" for path in (ROOT / "workers" / "methods").glob("*.py")]
"""By a registry, which no import graph shows."""


def test_every_module_that_a_run_can_reach_is_in_the_digest() -> None:
    modules = reachable("workers.child.attempt", "workers.engine.run", *LOADED_BY_NAME)
    assert {
        "workers/engine/tune/tuner.py",
        "workers/methods/sign_round.py",
        "workers/numerics/backends/block_kernels.py",
    } <= modules
    others = {path for path in modules if path.startswith(("app/limited/", "app/report_page/"))}
    assert modules - DIGESTED - NO_CODES == others, "children and pages decide no codes"


def test_every_method_adapter_and_format_is_in_the_digest() -> None:
    """Also those that a registry would load by name, which no import graph shows."""
    folders = ("engine", "methods", "adapters", "numerics", "formats")
    ours = {path.relative_to(ROOT).as_posix() for f in folders for path in (ROOT / "workers" / f).rglob("*.py")}
    assert ours <= DIGESTED
    assert len(ours) > 50


def test_what_is_left_out_exists_and_is_out_of_reach() -> None:
    assert {name for name in SUPERVISION if not (ROOT / name).exists()} == set()
    modules = reachable("workers.child.attempt", "workers.engine.run", *LOADED_BY_NAME)
    assert {path for path in modules if path.startswith(SUPERVISION)} == set()
