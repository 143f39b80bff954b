"""The parts of the documentation that are made from the code; `make docs` writes them.

A generated part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; `PARTS` says where and from what.
`tests/test_documentation.py` holds that writing them again would change nothing.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from app.api.http.errors import problem_response
from app.domain.adapters import ADAPTERS
from app.domain.formats import FORMATS, ExportFormat, FormatInfo, LowRankRule
from app.domain.gguf.architectures import ARCHITECTURES as GGUF_ARCHITECTURES
from app.domain.gguf.architectures import WRAPPERS
from app.domain.inputs.architectures import ACCEPTED_FILE, ARCHITECTURES, REFUSED
from app.domain.methods import (
    ALL_SCHEMES,
    METHODS,
    PER_CHANNEL,
    PRESET_SCHEMES,
    RECIPES,
    SCHEMES,
    Form,
    MethodInfo,
    Scheme,
    SchemeName,
)
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.job_request import JobRequest
from app.domain.runtimes import RuntimeSupport, Support
from app.settings import Settings
from benchmarks.tables.finetuning_table import finetuning_results
from benchmarks.tables.papers_table import finetuning_papers, papers
from benchmarks.tables.results_table import results
from bitwright.errors import InvalidRequest
from tests.described_files import FILES
from tests.documents.folders import FOLDERS

ROOT = Path(__file__).resolve().parent.parent

LONGEST_LINE = 125


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    rows = []
    for name, info in METHODS.items():
        paper = f"[arXiv:{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else "none"
        text = "yes" if info.needs_calibration else "no"
        rows.append([f"`{name}`", info.summary, _numbers(info.widths), _zero_points(info), text, paper])
    return table(("method", "what it does", "bits", "zero points", "calibration text", "paper"), rows)


def _zero_points(info: MethodInfo) -> str:
    """Whether a method takes `symmetric: false`."""
    if False in info.spec().symmetries():
        return "yes"
    return "with affine weights" if {Form.AFFINE, Form.CODEBOOK} <= info.produces else "no"


def presets_table() -> str:
    rows = []
    for name, preset, p in ((name, *item) for name, info in METHODS.items() for item in info.presets.items()):
        finer = "; integers up to 3 bits, MXFP4, llama.cpp's up to 4: "
        sets = finer.join(_fields(own) for own in (p.spec, {**p.coarse, **p.more_text()}) if own)
        sets += f"; MXFP4: {_fields(p.fp4)}" if p.fp4 else ""
        rows.append([f"`{name}`", f"`{preset}`", sets, str(p.num_samples), str(p.sequence_length)])
    return table(("method", "preset", "sets", "sequences", "tokens per sequence"), rows)


def recipes_table() -> str:
    rows = [[f"`{name}`", _fields(fields)] for name, fields in RECIPES.items()]
    for name, each in ADAPTER_RECIPES.items():
        rows.append([f"`{name}`", f"{_fields(each.quantization)}, `adapter`: `{each.kind}`; needs `finetune.dataset`"])
    return table(("recipe", "stands for"), rows)


def adapters_table() -> str:
    rows = [
        [
            f"`{kind}`",
            info.summary,
            f"[arXiv:{info.paper}](https://arxiv.org/abs/{info.paper})",
            "exactly, into the group offset" if info.merges_quantized else "in floating point",
            "a peft directory" if info.stock_peft else "a file with its own loader",
        ]
        for kind, info in ADAPTERS.items()
    ]
    return table(("adapter", "what is trained", "paper", "merges", "stays apart as"), rows)


def _fields(fields: Mapping[str, object]) -> str:
    return ", ".join(f"`{field}`: `{value}`" for field, value in fields.items())


def formats_table() -> str:
    rows = []
    for name, info in FORMATS.items():
        methods = ", ".join(f"`{m}`" for m, method in METHODS.items() if _can_hold(info, method)) or "none yet"
        held = _held(info)
        rows += [[f"`{name.value}`", methods, held, *_runtime_cells(runtime)] for runtime in info.runtimes]
    return table(("format", "methods", "holds", "runtime", "loads", "known"), rows)


def _runtime_cells(runtime: RuntimeSupport) -> list[str]:
    loads = f"{_numbers(runtime.bits)} bits, {_group_sizes(runtime)}{_schemes(runtime.schemes)}"
    for added in runtime.since:
        loads += f"; {_numbers(added.bits)} bits {_symmetries(added.symmetric)} since {added.version}"
    where = f"{runtime.runtime} on {runtime.devices}" if runtime.devices else runtime.runtime
    known = "tested" if runtime.support is Support.TESTED else "by its rules"
    return [where, loads + (f"; {runtime.note}" if runtime.note else ""), f"{known}, {runtime.version}"]


def schemes_table() -> str:
    rows = []
    for name, row in SCHEMES.items():
        held = ", ".join(f"`{export.value}`" for export, info in FORMATS.items() if name in info.schemes)
        bits = f"{Scheme.named(name).bits_per_weight(4096):.4g}"
        rows.append([f"`{name}`", row.title, bits, "calibration text" if row.calibrated else "", held])
    return table(("scheme", "what it is", "bits a weight", "needs", "formats"), rows)


def _schemes(names: frozenset[SchemeName]) -> str:
    if names == ALL_SCHEMES:
        return "; every scheme by name"
    if names == PRESET_SCHEMES:
        return "; every scheme by name but llama.cpp's types"
    return f"; {', '.join(f'`{name}`' for name in sorted(names))}" if names else ""


def _group_sizes(runtime: RuntimeSupport) -> str:
    if runtime.group_sizes is not None:
        finite = sorted(size for size in runtime.group_sizes if size != PER_CHANNEL)
        sizes = f"groups of {', '.join(map(str, finite))}"
        return sizes + (" or per channel" if PER_CHANNEL in runtime.group_sizes else "")
    if runtime.smallest_group > 1:
        return f"groups of {runtime.smallest_group} and more or per channel"
    if runtime.group_multiple > 1:
        return f"groups of multiples of {runtime.group_multiple} or per channel"
    return "any group size"


LOW_RANK = MappingProxyType(
    {
        LowRankRule.KEEPS: "kept beside them",
        LowRankRule.MERGES: "added in, unless `peft` is asked for too",
        LowRankRule.BESIDE: "only together with `peft`",
        LowRankRule.IS: "low-rank factors alone",
    }
)


def _can_hold(info: FormatInfo, method: MethodInfo) -> bool:
    makes_factors = Form.LOW_RANK in method.produces
    return bool(method.produces & info.kinds) and (makes_factors or info.low_rank is not LowRankRule.IS)


def _held(info: FormatInfo) -> str:
    if info.low_rank is LowRankRule.IS:
        return LOW_RANK[info.low_rank]
    weights = f"{_numbers(info.bits)} bits, {_symmetries(info.symmetries)}"
    if info.asymmetric_bits is not None:
        weights = f"{_numbers(info.bits)} bits symmetric, {_numbers(info.asymmetric_bits)} asymmetric"
    if Form.AFFINE not in info.kinds:
        weights = f"{_numbers(info.bits)} bits on a codebook"
    if info.group_sizes is not None:
        weights += f", groups of {', '.join(map(str, sorted(info.group_sizes)))}"
    elif info.group_multiple > 1:
        weights += f", groups of multiples of {info.group_multiple} or per channel"
    if info.output_multiple > 1:
        weights += f", outputs in multiples of {info.output_multiple}"
    if info.uniform:
        weights += ", one scheme for all linears"
    if info.architectures is not None:
        weights += f", the model types that {info.known_by} knows"
    codebook = ", or on a codebook" if {Form.CODEBOOK, Form.AFFINE} <= info.kinds else ""
    return f"{weights}{codebook}; low-rank factors {LOW_RANK[info.low_rank]}"


def _numbers(values: frozenset[int]) -> str:
    ordered = sorted(values)
    whole = len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} to {ordered[-1]}" if whole else ", ".join(map(str, ordered))


def _symmetries(values: frozenset[bool]) -> str:
    return " or ".join(word for flag, word in ((True, "symmetric"), (False, "asymmetric")) if flag in values)


def architectures_table() -> str:
    rows = [
        [
            f"`{model_type}`",
            row.title,
            f"`{row.model_class}`",
            f"`{gguf_name(model_type)}`" if gguf_name(model_type) else "",
            "; ".join(f"{f}: {why}" for f, why in row.refusals.items()),
        ]
        for model_type, row in ARCHITECTURES.items()
    ]
    refused = [[f"`{model_type}`", why] for model_type, why in REFUSED.items()]
    accepted = table(
        ("`model_type`", "models", "class of transformers", "in llama.cpp", "formats that it cannot have"), rows
    )
    return f"{accepted}\n\nKnown, and refused:\n\n{table(('`model_type`', 'why'), refused)}"


def gguf_name(model_type: str) -> str:
    """llama.cpp's architecture of a type; nothing where there is none."""
    row = GGUF_ARCHITECTURES.get(WRAPPERS.get(model_type, model_type))
    return row.name if row is not None and model_type in (ExportFormat.GGUF.info.architectures or ()) else ""


def proofs_table() -> str:
    """What `make test-architectures` measured of every type."""
    stored = json.loads(ACCEPTED_FILE.read_text(encoding="utf-8"))
    kinds = ("rtn, native", "rtn, merged", "rtn, compressed-tensors", "signround, merged")
    rows = []
    for name, row in stored["types"].items():
        measured = row.get("perplexity", {})
        rows.append([f"`{name}`", f"{row.get('streamed', 0.0):.0e}", *(_off(measured.get(kind)) for kind in kinds)])
    return table(("`model_type`", "streamed logits", *kinds), rows)


def _off(value: float | None) -> str:
    return "refused" if value is None else f"{value:.2%}"


def models_sentence() -> str:
    return (
        f"{len(ARCHITECTURES)} model types of transformers, from Llama, Qwen and Gemma to mixtures of experts, hybrid "
        "and recurrent models and the language models inside vision-language models: "
        "[the list](docs/reference/methods.md#architectures)."
    )


def problem_example() -> str:
    """The answer to a request with a value out of range."""
    try:
        JobRequest.parse({"model": "ORG/MODEL", "method": "gptq", "bits": 9})
    except InvalidRequest as error:
        problem = json.loads(bytes(problem_response(error, instance="/v1/jobs", request_id=None).body))
        return f"```json\n{json.dumps(problem, indent=2)}\n```"
    raise AssertionError("nine bits were accepted")


def settings_table() -> str:
    rows = [
        [f"`BITWRIGHT_{name.upper()}`", _default(name), field.description or ""]
        for name, field in Settings.model_fields.items()
    ]
    return table(("variable", "default", "meaning"), rows)


MADE_DEFAULTS = MappingProxyType(
    {
        "data_dir": "`~/.local/share/bitwright`",
        "database_url": "SQLite in the data folder",
        "blob_url": "`blobs` in the data folder",
        "workspace_dir": "`workspaces` in the data folder",
        "upload_dir": "`uploads` in the data folder",
        "worker_name": "the host's name",
        "kernel_dir": "`~/.local/share/bitwright/kernels`",
    }
)
"""Defaults that a function makes, in words."""


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return MADE_DEFAULTS[name]
    value = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if isinstance(value, int | float) or value else ""


def tree() -> str:
    entries = list(_tree_entries())
    width = max(len(label) for label, _ in entries) + 2
    return "```\n" + "\n".join(f"{label:<{width}}{summary}" for label, summary in entries) + "\n```"


def _tree_entries() -> Iterator[tuple[str, str]]:
    """Indented name and line of every folder, of every module outside the tests, and of the other files."""
    for folder, summary in FOLDERS.items():
        path = ROOT / folder
        if not any(path.rglob("*.py")) and not any(path.glob("*.md")):
            continue
        yield _label(folder) + "/", summary
        if not folder.startswith(("tests", "migrations/versions")):
            modules = sorted(module for module in path.glob("*.py") if module.stem != "__init__")
            yield from ((_label(f"{folder}/{module.name}"), _first_sentence(module)) for module in modules)
        yield from ((_label(name), line) for name, line in FILES.items() if name.rpartition("/")[0] == folder)
    yield from ((name, line) for name, line in FILES.items() if name.rpartition("/")[0] not in FOLDERS)


def _label(path: str) -> str:
    return "  " * path.count("/") + path.rpartition("/")[2]


def _first_sentence(module: Path) -> str:
    """The first sentence of a module's docstring, up to a colon or semicolon where it is long."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n", maxsplit=1)[0].split())
    sentence = re.split(r"(?<=[a-z0-9)`])\. ", paragraph, maxsplit=1)[0].rstrip(".:")
    return sentence if len(sentence) <= LONGEST_LINE else re.split(r"[:;] ", sentence, maxsplit=1)[0]


PARTS: MappingProxyType[str, tuple[str, Callable[[], str]]] = MappingProxyType(
    {
        "models": ("README.md", models_sentence),
        "methods": ("docs/reference/methods.md", methods_table),
        "presets": ("docs/reference/methods.md", presets_table),
        "recipes": ("docs/reference/methods.md", recipes_table),
        "adapters": ("docs/reference/methods.md", adapters_table),
        "architectures": ("docs/reference/methods.md", architectures_table),
        "formats": ("docs/reference/formats.md", formats_table),
        "schemes": ("docs/reference/formats.md", schemes_table),
        "settings": ("docs/reference/settings.md", settings_table),
        "problem": ("docs/reference/errors.md", problem_example),
        "tree": ("docs/code-map.md", tree),
        "papers": ("docs/papers.md", papers),
        "finetuning papers": ("docs/papers.md", finetuning_papers),
        "results": ("docs/results.md", results),
        "architecture proofs": ("docs/results.md", proofs_table),
        "finetuning results": ("docs/results.md", finetuning_results),
    }
)
"""Name of a generated part -> the document that it stands in, and what makes it."""


def with_part(document: str, name: str, content: str) -> str:
    """`document` with the part `name` replaced.

    Raises:
        ValueError: the document has no such part, or has it twice.
    """
    pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
    made, count = pattern.subn(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", document)
    if count != 1:
        raise ValueError(f"the part {name!r} stands {count} times in the document, not once")
    return made


def write() -> None:
    """Write every generated part into its document."""
    for name, (document, make) in PARTS.items():
        path = ROOT / document
        path.write_text(with_part(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    write()
