"""The rules that keep the code as it was meant, read from the source text itself.

import-linter says which package may import which (`pyproject.toml`); this file runs it, and holds the rules that an
import graph cannot say.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("app", "bitwright", "workers", "migrations")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]

FORBIDDEN_NAMES = frozenset({"util", "utils", "helper", "helpers", "common", "base", "manager", "managers", "misc"})
UNSAFE_MODULES = frozenset({"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
UNSAFE_CALLS = frozenset({"torch.load", "os.system", "os.popen", "yaml.load", "eval", "exec"})
OPENS_A_CLAUSE = frozenset({"What", "Which", "Who", "Whose", "How", "Whether", "Where", "When", "Why"})
"""A docstring opens with a noun phrase or a verb, so that a list of modules or functions can be skimmed."""
GATHERING = frozenset(
    {
        "app/api/event_feed.py:Subscription",
        "app/api/submission/preflight.py:Preflight",
        "app/cli/children.py:Children",
        "app/cli/children.py:_Child",
        "bitwright/event_stream.py:ServerSentEvent",
        "workers/engine/export.py:Exported",
        "workers/engine/finetune/trainer.py:_Training",
        "workers/engine/goal/stage.py:_Aim",
        "workers/engine/scales/tuning.py:ScaleTuning",
        "workers/engine/stored_scales.py:StoredScales",
        "workers/engine/text/documents.py:LeftOut",
        "workers/engine/text/documents.py:Notes",
        "workers/engine/text/examples.py:Examples",
        "workers/engine/tune/tuned_block.py:Accumulation",
        "workers/engine/tune/tuner.py:_Run",
        "workers/methods/awq.py:Observed",
    }
)
"""Dataclasses whose fields change while they are used. All others are values, and frozen."""
LONGEST_FILE = 500
"""Lines. About 300 is the guide, judged in review; a file that passes this limit has two subjects."""
FULLEST_FOLDER = 20
"""Modules beside `__init__`: as many as are read at one look. A folder that passes this limit has two subjects."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    """Each file is parsed once, though many rules read it."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain or a name; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def imported(path: Path) -> Iterator[tuple[str, str, int]]:
    """Module, name ("" for a plain import) and line of every import of a file, those inside functions too."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name, node.lineno) for alias in node.names)


def environment_reads(path: Path) -> Iterator[tuple[str, int]]:
    """Name and line of every `os.environ[name]`, `os.environ.get(name)` and `os.getenv(name)` of a file."""
    for node in nodes(path):
        if isinstance(node, ast.Call) and dotted(node.func) in {"os.environ.get", "os.getenv", "environ.get", "getenv"}:
            arguments = node.args[:1]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            arguments = [node.slice] if dotted(node.value) in {"os.environ", "environ"} else []
        else:
            continue
        yield from ((str(item.value), node.lineno) for item in arguments if isinstance(item, ast.Constant))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def fresh_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("app.api.main", "torch transformers numpy workers"),
        ("bitwright.cli.main, bitwright", "torch transformers numpy sqlalchemy celery fastapi"),
        (
            "workers.supervise.work, workers.sweep, workers.supervise.attempt.attempt_runner",
            "torch transformers fastapi",
        ),
        ("workers.child.attempt", "sqlalchemy celery fastapi httpx"),
    ],
)
def test_importing_modules_does_not_load(modules: str, absent: str) -> None:
    code = f"import {modules}, sys; print(*(set({absent.split()!r}) & set(sys.modules)))"
    result = fresh_interpreter(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_import_contracts_hold() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: " in result.stdout


def test_only_the_session_module_commits() -> None:
    """A transaction's commit takes no argument; a Hub commit that is looked up does."""
    found = [
        f"{relative(path)}:{call.lineno}"
        for path in SOURCES
        if relative(path) != "app/store/session.py"
        for call in calls(path)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "commit" and not call.args
    ]
    assert found == []


def test_sql_is_written_in_the_store_alone() -> None:
    statements = {"select", "insert", "update", "delete", "text", "create_engine"}
    found = [
        f"{relative(path)}:{line} {name}"
        for path in SOURCES
        if not relative(path).startswith(("app/store/", "migrations/"))
        for module, name, line in imported(path)
        if module.split(".")[0] == "sqlalchemy" and (name in statements or not name)
    ]
    assert found == []


def test_the_domain_needs_pydantic_and_the_standard_library_alone() -> None:
    allowed = sys.stdlib_module_names | {"pydantic", "pydantic_core", "annotated_types"}
    found = [
        f"{relative(path)}:{line} {module}"
        for path in sorted((ROOT / "app" / "domain").rglob("*.py"))
        for module, _, line in imported(path)
        if module.split(".")[0] not in allowed and not module.startswith(("app.domain", "bitwright."))
    ]
    assert found == []


def test_only_the_settings_read_the_environment() -> None:
    """Alembic's own entry is for people, who name a database; it must not fall back to a default one."""
    found = [
        f"{relative(path)}:{line} {name}"
        for path in SOURCES
        if relative(path) not in {"app/settings.py", "bitwright/endpoint.py", "migrations/env.py"}
        for name, line in environment_reads(path)
        if name.removeprefix("BITWRIGHT_") in {field.upper() for field in Settings.model_fields}
    ]
    assert found == []


def test_only_the_cli_prints() -> None:
    """The loader is a program of its own: it lies in every native checkpoint."""
    found = [
        f"{relative(path)}:{call.lineno}"
        for path in SOURCES
        if not relative(path).startswith(
            ("app/cli/", "bitwright/cli/", "workers/formats/load_bitwright.py", "workers/formats/packed/load_")
        )
        for call in calls(path)
        if dotted(call.func) == "print"
    ]
    assert found == []


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    found: list[str] = []
    for path in ALL_PYTHON:
        found += [
            f"{relative(path)}:{line} imports {module}"
            for module, _, line in imported(path)
            if module.split(".")[0] in UNSAFE_MODULES
        ]
        for call in calls(path):
            if dotted(call.func) in UNSAFE_CALLS:
                found.append(f"{relative(path)}:{call.lineno} calls {dotted(call.func)}")
            found += [
                f"{relative(path)}:{call.lineno} {keyword.arg}"
                for keyword in call.keywords
                if keyword.arg in {"trust_remote_code", "shell"}
                if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
    assert found == []


def test_names_say_what_a_file_holds() -> None:
    paths = [path.relative_to(ROOT) for path in ALL_PYTHON]
    found = sorted({str(path) for path in paths for part in path.with_suffix("").parts if _vague(part)})
    assert found == []


def _vague(name: str) -> bool:
    # `base_job` is a field of the request: there "base" has a meaning of its own.
    return not FORBIDDEN_NAMES.isdisjoint(name.lower().replace("base_job", "").split("_"))


def test_every_module_says_what_it_is() -> None:
    modules = {relative(path): tree(path) for path in SOURCES}
    assert [name for name, module in modules.items() if module.body and not ast.get_docstring(module)] == []


def test_a_module_opens_with_a_noun_phrase_or_a_verb() -> None:
    clauses = [relative(path) for path in ALL_PYTHON if _opens_a_clause(ast.get_docstring(tree(path)) or "")]
    assert clauses == []


def test_docstrings_open_with_a_noun_phrase_or_a_verb() -> None:
    clauses = [
        f"{relative(path)}:{line}"
        for path in SOURCES
        for line, docstring in docstrings(path)
        if _opens_a_clause(docstring)
    ]
    assert clauses == []


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file: of modules, classes, functions, attributes and constants."""
    for node in nodes(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def _opens_a_clause(docstring: str) -> bool:
    return re.split(r"[\s,:;']", docstring, maxsplit=1)[0] in OPENS_A_CLAUSE


def test_dataclasses_are_frozen_but_those_that_gather() -> None:
    changing = {
        f"{relative(path)}:{node.name}"
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if "dataclass" in ast.unparse(decorator) and "frozen=True" not in ast.unparse(decorator)
    }
    assert changing == GATHERING


def test_no_file_has_two_subjects() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_PYTHON}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_folder_has_more_modules_than_are_read_at_one_look() -> None:
    counts = Counter(relative(path.parent) for path in ALL_PYTHON if path.name != "__init__.py")
    assert {folder: count for folder, count in counts.items() if count > FULLEST_FOLDER} == {}


def test_widths_of_groups_are_computed_in_schemes_alone() -> None:
    """Elsewhere `scheme.width(columns)` or `group_width(group_size, columns)` say that -1 means a whole row."""
    assert [
        f"{relative(path)}:{line}"
        for path in SOURCES
        if relative(path) != "app/domain/methods/schemes.py"
        for line in spelled_widths(path)
    ] == []


def spelled_widths(path: Path) -> Iterator[int]:
    """Lines of conditional expressions that compare a group size and do not choose between words for people."""
    for node in nodes(path):
        if not isinstance(node, ast.IfExp) or not isinstance(node.test, ast.Compare):
            continue
        operands = [node.test.left, *node.test.comparators]
        words = isinstance(node.body, ast.Constant) and isinstance(node.body.value, str)
        if not words and any(dotted(operand).split(".")[-1] == "group_size" for operand in operands):
            yield node.lineno


def test_optional_behaviour_is_a_protocol() -> None:
    """In the engine and what it calls nobody looks for an attribute by name: a misspelled one would be silently off.

    Those that are left look into objects of transformers or torch.
    """
    seams: tuple[str, ...] = (
        "workers/adapters/",
        "workers/contracts/",
        "workers/engine/tune/",
        "workers/engine/finetune/",
    )
    seams += ("workers/engine/quantize/", "workers/engine/scales/", "workers/methods/", "workers/numerics/")
    assert [
        f"{relative(path)}:{call.lineno}"
        for path in SOURCES
        if relative(path).startswith(seams)
        for call in calls(path)
        if looks_up(call)
    ] == []


def looks_up(call: ast.Call) -> bool:
    """True if it is `hasattr`, or a `getattr` with a default, of a name in quotes; a linear's bias may be absent."""
    if dotted(call.func) not in {"hasattr", "getattr"} or len(call.args) < 2:
        return False
    name, defaults = call.args[1], len(call.args) > 2 or dotted(call.func) == "hasattr"
    return defaults and isinstance(name, ast.Constant) and name.value != "bias"


def test_kernels_are_chosen_in_one_place() -> None:
    """A module that is imported by a name in a string escapes mypy and the import contracts."""
    assert [
        f"{relative(path)}:{call.lineno}"
        for path in SOURCES
        # Formats are found by their row's name, and methods by their spec, so that a new one is its file and its row.
        if relative(path).startswith("workers/")
        and relative(path) not in ("workers/formats/registry.py", "workers/engine/quantize/registry.py")
        for call in calls(path)
        if dotted(call.func).split(".")[-1] == "import_module"
    ] == []


def test_the_checks_see_what_they_forbid(tmp_path: Path) -> None:
    """The readers above find their prey: a rule that can see nothing would pass for ever."""
    source = tmp_path / "sample.py"
    source.write_text(
        "import pickle\nimport os\nfrom sqlalchemy import select\n"
        "def f(session, torch):\n    session.commit()\n    torch.load('x', weights_only=False)\n    print(1)\n"
        "    return os.environ['BITWRIGHT_PORT']\n"
    )
    seams = tmp_path / "seams.py"
    seams.write_text(
        "n = 1 if scheme.group_size < 0 else 2\nm = 'row' if -1 == group_size else 'group'\n"
        "getattr(block, 'together', ())\nhasattr(block, 'joined')\ngetattr(torch, 'float16')\n"
    )
    assert list(spelled_widths(seams)) == [1]
    assert [call.lineno for call in calls(seams) if looks_up(call)] == [3, 4]
    assert ("pickle", "", 1) in set(imported(source))
    assert ("sqlalchemy", "select", 3) in set(imported(source))
    assert {dotted(call.func) for call in calls(source)} == {"session.commit", "torch.load", "print"}
    assert list(environment_reads(source)) == [("BITWRIGHT_PORT", 8)]
    assert _vague("quantization_utils")
    assert not _vague("database")
    assert _opens_a_clause("Where blobs lie.")
    assert not _opens_a_clause("Whereabouts of blobs.")
    words = tmp_path / "words.py"
    words.write_text('"""Words."""\nx = 1\n"""How many."""\nclass A:\n    def f(self):\n        """Whether so."""\n')
    assert [line for line, docstring in docstrings(words) if _opens_a_clause(docstring)] == [3, 6]


def test_migrations_are_one_line() -> None:
    """Two that were written beside each other both follow the same one: the later to come takes the next number."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "migrations/versions").glob("0*.py")}
    revisions = [re.findall(r'^(?:down_)?revision: .* = (?:"(\d{4})"|None)$', text, re.M) for text in sources.values()]
    assert sorted(revisions) == [[f"{n:04}", f"{n - 1:04}" if n > 1 else ""] for n in range(1, len(sources) + 1)]
