"""The documentation says what the code does: generated parts are fresh, examples are valid, names exist."""

import ast
import json
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from app.api.main import create_app
from app.domain.methods import METHODS
from app.domain.request.exports import ExportRequest
from app.domain.request.job_request import JobRequest
from app.settings import Settings
from bitwright.errors import ERRORS, FieldProblem
from bitwright.views import UploadRequest
from tests.command_lines import check_bitwright
from tests.described_files import FILES
from tests.documentation import PARTS, ROOT, with_part
from tests.documents.folders import FOLDERS

README = ROOT / "README.md"
README_BYTES = 10_240
GUIDES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guides").glob("*.md")))
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.DOTALL | re.MULTILINE)


def shell_commands(document: str) -> list[list[str]]:
    """The words of every command in a document's `sh` blocks; of a pipeline, its first command."""
    joined = "\n".join(code_blocks(document, "sh")).replace("\\\n", " ")
    commands = []
    for line in _complete_lines(joined):
        words = shlex.split(line, comments=True)
        if words:
            commands.append(words[: words.index("|")] if "|" in words else words)
    return commands


def _complete_lines(text: str) -> list[str]:
    """Lines, with those of a quoted string that spans several put together."""
    lines: list[str] = []
    open_quote = False
    for line in text.splitlines():
        if open_quote:
            lines[-1] += "\n" + line
        else:
            lines.append(line)
        open_quote ^= line.count("'") % 2 == 1
    return lines


CURLS = [words for words in shell_commands(GUIDES) if words[0] == "curl"]
VARIABLES = {"$SIZE": "1", "$SHA256": "0" * 64, "$UPLOAD": "upl_01k6z3f8c2v9q4w7x5y1t0r8ab"}
"""Values that the shell puts into the bodies of the examples; that the examples work is shown in tests/documents."""


def curl_target(words: list[str]) -> tuple[str, str]:
    """Method and route of a curl command; variables stand for path parameters."""
    stated = dict(pairwise(words))
    method = stated.get("-X") or ("HEAD" if "-I" in words else "GET")
    url = next(word for word in words if word.startswith("$BITWRIGHT"))
    path = re.sub(r"\$[A-Z]+", "{}", urlsplit(url.removeprefix("$BITWRIGHT")).path)
    return method, path.replace("calibration.jsonl", "{}")


@pytest.mark.parametrize("name", PARTS)
def test_generated_part_is_fresh(name: str) -> None:
    document, make = PARTS[name]
    text = (ROOT / document).read_text(encoding="utf-8")
    assert with_part(text, name, make()) == text, "run `make docs`"


def test_every_folder_with_code_has_a_line() -> None:
    packages = {
        folder.relative_to(ROOT).as_posix()
        for top in ("bitwright", "app", "workers", "migrations", "tests", "benchmarks")
        for folder in [ROOT / top, *(ROOT / top).rglob("*")]
        if folder.is_dir() and any(folder.glob("*.py"))
    }
    assert packages - FOLDERS.keys() == set()


def test_every_file_of_the_tree_exists() -> None:
    assert [name for name in FILES if not (ROOT / name).is_file()] == []
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "adr"}
    assert pages - FILES.keys() == set()


@cache
def routes() -> dict[str, set[str]]:
    """Methods by path, with {} for an id."""
    paths = create_app(Settings()).openapi()["paths"]
    return {re.sub(r"\{[^}]+\}", "{}", route): set(operations) for route, operations in paths.items()}


@pytest.mark.parametrize("words", CURLS, ids=lambda words: " ".join(curl_target(words)))
def test_curl_example_names_a_route(words: list[str]) -> None:
    method, path = curl_target(words)
    methods = routes()
    assert path in methods
    assert method.lower() in methods[path]


def test_curl_examples_show_the_whole_life_of_a_job() -> None:
    shown = {curl_target(words) for words in CURLS}
    assert shown >= {
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}/events"),
        ("GET", "/v1/jobs/{}/archive"),
        ("GET", "/v1/artifacts/{}/content"),
        ("PUT", "/v1/uploads/{}/files/{}"),
    }


def test_bodies_of_the_curl_examples_are_valid() -> None:
    parsed = 0
    for words in CURLS:
        if "-d" not in words:
            continue
        text = words[words.index("-d") + 1]
        for variable, value in VARIABLES.items():
            text = text.replace(variable, value)
        body = json.loads(text)
        if curl_target(words)[1] == "/v1/uploads":
            UploadRequest.model_validate(body)
        elif curl_target(words)[1].endswith("/exports"):
            ExportRequest.model_validate(body)
        else:
            assert JobRequest.parse(body).quantization.method in METHODS
        parsed += 1
    assert parsed == sum(words[words.index("-X") + 1] == "POST" for words in CURLS if "-d" in words) >= 3


def test_files_of_the_command_line_are_valid_requests() -> None:
    files = [yaml.safe_load(code) for code in code_blocks(GUIDES, "yaml")]
    workflows = [body for body in files if "steps" in body]
    assert len(workflows) == 1
    files = [body for body in files if body not in workflows]
    parsed = [JobRequest.parse({"model": "ORG/MODEL", **body}) for body in files]
    assert sum(request.finetune is not None for request in parsed) == 1
    assert sum(request.require is not None for request in parsed) == 2


def test_requests_of_the_papers_are_valid() -> None:
    """Each with what the page says that all of its table share."""
    quantizing, finetuning = (json.loads(code) for code in code_blocks(PAPERS, "json"))
    assert JobRequest.parse(quantizing).finetune is None
    assert JobRequest.parse(finetuning).finetune is not None
    rows = [json.loads(code) for code in re.findall(r"^\| .* \| `(\{.*\})` \| .* \|$", PAPERS, re.MULTILINE)]
    for row in rows:
        if "adapter" in row:
            finetune = {**finetuning["finetune"], **row.pop("finetune")}
            quantization = {**row.pop("quantization", finetuning["quantization"]), "bits": 3}
            assert JobRequest.parse({**finetuning, **row, "quantization": quantization, "finetune": finetune}).merge
        else:
            bits = {"average": 2.75} if row["method"] == "lq-lora" else 2
            request = JobRequest.parse({**quantizing, "quantization": {**row, "bits": bits}})
            assert request.quantization.method == row["method"]
    assert len(rows) >= 20


def test_figures_of_the_papers_and_of_the_readme_are_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"bits: (\d+\.\d{4})", PAPERS)
    peers = README.read_text(encoding="utf-8").partition("| task |")[2].partition("\n\n")[0]
    figures += re.findall(r"\d+\.\d+(?= s| GiB)|\d+,\d+(?= tokens)|0\.\d{4}", peers)
    assert [figure for figure in figures if figure not in results] == []
    assert len(figures) >= 60


def test_the_readme_stays_a_page() -> None:
    assert README.stat().st_size <= README_BYTES


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_and_json_examples_can_be_read(path: Path) -> None:
    document = path.read_text(encoding="utf-8")
    for code in code_blocks(document, "python"):
        ast.parse(code)
    for code in code_blocks(document, "json"):
        json.loads(code)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    targets = [urlsplit(target) for target in re.findall(r"\]\(([^)\s]+)", path.read_text(encoding="utf-8"))]
    local = [(path.parent / target.path if target.path else path, target) for target in targets if not target.scheme]
    assert [target.geturl() for file, target in local if not file.exists()] == []
    assert [target.geturl() for file, target in local if target.fragment and target.fragment not in anchors(file)] == []


def anchors(document: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`((?:app|bitwright|workers|tests|benchmarks)/[\w/.]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_can_be_given(path: Path) -> None:
    document = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    mentions = [shlex.split(code) for code in re.findall(r"`((?:make|bitwright) [^`]+)`", document)]
    commands = shell_commands(document)
    assert [words[1] for words in [*commands, *mentions] if words[0] == "make" and words[1] not in targets] == []
    for words in commands:
        if words[0] == "bitwright":
            check_bitwright([word for word in words[1:] if word != "&"])
    for words in mentions:
        if words[0] == "bitwright" and "--help" not in words:
            check_bitwright(words[1:], mention=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_variables_exist(path: Path) -> None:
    known = {f"BITWRIGHT_{name.upper()}" for name in Settings.model_fields} | {"BITWRIGHT_URL", "BITWRIGHT_KEY"}
    named = set(re.findall(r"BITWRIGHT_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8")))
    assert {name for name in named - known if not name.startswith("BITWRIGHT_TEST_")} == set()


ERROR_ROW = re.compile(r"^\| `(\w+)` \| (\d{3}) \| (\w+) \| (.+?) \| .+ \|$", re.MULTILINE)


def test_every_error_code_is_documented() -> None:
    rows = ERROR_ROW.findall((ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8"))
    documented = {code: (int(status), retry, title) for code, status, retry, title in rows}
    assert documented == {code: (e.status, e.retry.value, e.title) for code, e in ERRORS.items()}
    assert len(rows) == len(documented)


def test_every_code_of_a_field_problem_is_documented() -> None:
    """The codes that the domain gives to `FieldProblem` or maps pydantic's errors to, read from its source."""
    domain = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "app" / "domain").rglob("*.py")]
    given = {
        keyword.value.value
        for tree in domain
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == FieldProblem.__name__
        for keyword in call.keywords
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant)
    }
    document = (
        (ROOT / "docs" / "reference" / "errors.md")
        .read_text(encoding="utf-8")
        .partition("## Codes of field problems")[2]
    )
    assert given <= set(re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE))
    assert "unknown_method" in given


def test_the_house_rules_stay_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) <= 150
