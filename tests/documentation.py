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
from benchmarks.finetuning_table import finetuning_results
from benchmarks.papers_table import finetuning_papers, papers
from benchmarks.results_table import results
from bitwright.errors import InvalidRequest
from tests.described_files import FILES

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = MappingProxyType(
    {
        "bitwright": "What users install: client, commands, and the types shared with the service",
        "bitwright/cli": "The user's commands",
        "bitwright/asynchronous": "The client for event loops, and the source of the blocking one",
        "bitwright/blocking": "The client for blocking programs, made from the asynchronous one",
        "app": "The service without torch: API, store, the operator's commands",
        "app/domain": "Pure types: pydantic and the standard library only",
        "app/domain/request": "The request: shorthand, recipes, sources, problems",
        "app/domain/methods": "Schemes, specs and budgets of quantization methods, and their catalogue",
        "app/domain/gguf": "llama.cpp's architectures, and what a GGUF file cannot say",
        "app/domain/goals": "Goals in bytes: what formats store, what a cache takes, what is out of reach",
        "app/domain/adapters": "Specs and shapes of adapters",
        "app/domain/sizes": "Sizes of results, told before anything is made",
        "app/domain/inputs": "Checks of files that strangers send",
        "app/domain/inputs/quantized": "Quantized sources by their headers: which tensors mean which weight",
        "app/store": "SQLAlchemy; the only place with SQL",
        "app/store/tenancy": "Tenants, keys, quotas, use, audit, tokens, sessions",
        "app/store/upkeep": "Backup, restore, garbage",
        "app/report_page": "A report as one self-contained page: figures, charts as SVG",
        "app/hub": "Looks at repositories on the Hub, without fetching them",
        "app/limited": "A child process with limits for what strangers send: no network, its end is a result",
        "app/inspection": "Looks at checkpoints for the API, in such children, one at a time for each tenant",
        "app/api": "FastAPI: one file per resource",
        "app/api/http": "What all routes share: errors, middleware, strict parameters, ranges and archives",
        "app/api/pages": "The dashboard: sessions, pages from templates, the submit form",
        "app/api/submission": "Checks of a request before it is queued: sources, capacity, a look at the Hub",
        "app/api/tenancy": "What a request costs its tenant: quotas, their headers, the audit log, late writes",
        "app/api/admin": "Routes for operators: tenants, keys, use, the audit log",
        "app/cli": "The operator's commands",
        "workers": "Celery on one side of a process boundary, torch on the other; never FastAPI",
        "workers/supervise": "Claims a job, runs an attempt in a child process, keeps its lease, stores its results",
        "workers/supervise/spares": "Processes that wait for the next job: started, renewed, given an order or ended",
        "workers/child": "Runs in the child process; no database, broker, bucket or key",
        "workers/runtimes": "Programs that such a child runs: a checkpoint read in transformers, llama.cpp or vLLM",
        "workers/disk": "Workspaces, durable writes, the Hub cache",
        "workers/contracts": "The seam between engine, methods, adapters and formats",
        "workers/engine": "The stages of a job, in the order of `run.py`",
        "workers/engine/loads_here": "Checks that runtimes load the result: one block before, the files afterwards",
        "workers/engine/model": "Checkpoint, meta model, streamed and fused blocks",
        "workers/engine/model/sources": "Quantized sources as ordinary tensors, made when they are read",
        "workers/engine/untrusted": "A job's configuration, tokenizer and texts, read in a limited child",
        "workers/engine/text": "Calibration, evaluation and training text",
        "workers/engine/device": "Device, ranks, CUDA graphs, copies behind the work",
        "workers/engine/quantize": "Block by block: activations, method, finished blocks",
        "workers/engine/tune": "The tuning loop that learned methods share",
        "workers/engine/scales": "All scales tuned end to end",
        "workers/engine/goal": "A goal in place of bits: scores, the frontier, the smallest result that holds",
        "workers/engine/finetune": "Training of adapters beside the quantized model",
        "workers/engine/weights_only": "Jobs without a model: tensors of files, one by one",
        "workers/engine/exports": "Other formats of a finished job's result, from its native checkpoint",
        "workers/adapters": "Adapters: attached, trained, merged",
        "workers/formats": "Checkpoint formats, each an exact inverse of itself",
        "workers/formats/cards": "Model cards: what a checkpoint is, how it loads, what it learned",
        "workers/formats/compressed_tensors": "compressed-tensors: tensors, configuration, refusals",
        "workers/formats/gguf": "GGUF files: tensors, tokenizer, metadata",
        "workers/formats/gguf/architectures": "Model types as llama.cpp has them, a row of data for each",
        "workers/formats/gguf/tokenizers": "Tokenizers as llama.cpp has them, a file for each kind",
        "workers/formats/packed": "What the formats of 32-bit words share: words, checks, loader",
        "workers/formats/mlx": "MLX's affine checkpoints",
        "workers/formats/bitsandbytes": "bitsandbytes' NF4 checkpoints",
        "workers/methods": "One file per method",
        "workers/numerics": "Codes, scales, codebooks and packing",
        "workers/numerics/blocks": "llama.cpp's block types: levels, and the search of their scales",
        "workers/numerics/backends": "Triton kernels beside their twins in torch",
        "workers/numerics/floats": "FP8 and FP4: tables, scales, learned rounding, inputs rounded to them",
        "workers/numerics/loops": "Loops that Numba compiles: the quantizer, and what lies between products",
        "migrations": "Alembic",
        "migrations/versions": "One file per change of the tables",
        "benchmarks": "Measurements side by side; never part of the tests",
        "benchmarks/gguf": "GGUF files beside those of llama.cpp's quantizer",
        "benchmarks/service": "The API under load, and lists of a million jobs",
        "tests": "Mirrors app/ and workers/",
        "tests/adapters": "Adapters and merges against dense fp64 algebra",
        "tests/api": "The HTTP interface, through a real server or client",
        "tests/api/admin": "Tenants and keys over HTTP, and a walk over all routes with every kind of key",
        "tests/api/pages": "The dashboard through a client: sessions, pages, the form",
        "tests/browser": "The dashboard in a real Chromium",
        "tests/report_page": "report.html against report.json, and against hostile text",
        "tests/benchmarks": "The list of measurements and the tables made of them",
        "tests/store/tenancy": "Tenants and keys in the database",
        "tests/hub": "Looks at a Hub on loopback that counts its bytes",
        "tests/child": "The child's side of the process boundary, and the fetch",
        "tests/cli": "The command line",
        "tests/bitwright": "The client against real sockets",
        "tests/conformance": "Suites that every method, adapter and format must pass",
        "tests/inspection": "Looks in real children: limits, turns of tenants, ends",
        "tests/hostile": "Some hundreds of small files of strangers, each refused with its code",
        "tests/limited": "A limited child: what it cannot do, and its ends",
        "tests/disk": "Workspaces and caches",
        "tests/documents": "Every shell and Python block of the documents, against a live service",
        "tests/domain": "Requests, formats and errors",
        "tests/domain/adapters": "Specs and shapes of adapters",
        "tests/domain/gguf": "What a configuration says and a GGUF file cannot",
        "tests/domain/goals": "Goals in a request, caches, and what sizes put out of reach",
        "tests/domain/inputs": "Checks of files that strangers send",
        "tests/domain/inputs/quantized": "Headers of quantized sources that lie",
        "tests/domain/methods": "Specs, budgets and module rules",
        "tests/domain/request": "Requests, shorthand and recipes",
        "tests/e2e": "Whole jobs with real processes, faults included",
        "tests/engine": "Streaming, resume and evaluation against plain transformers",
        "tests/engine/architectures": "Every accepted type on tiny checkpoints, and the list of them",
        "tests/engine/device": "Ranks, CUDA, reading ahead and writing behind",
        "tests/engine/exports": "Exports against the job's own files, and their memory",
        "tests/engine/finetune": "Training, its plan and its checkpoints",
        "tests/engine/loads_here": "Faults of writers, planted and found by real children",
        "tests/engine/model": "Checkpoints, streamed and fused blocks",
        "tests/engine/model/sources": "Quantized sources against the libraries that they are of",
        "tests/engine/quantize": "The block pass, base jobs, budgets",
        "tests/engine/scales": "End-to-end scale tuning",
        "tests/engine/goal": "Goals through the engine: the frontier, the search, jobs that keep them",
        "tests/engine/ships": "Files of whole jobs, loaded by the runtimes that they are for",
        "tests/engine/ships/gguf": "Every architecture and tokenizer of GGUF files, in a real llama.cpp",
        "tests/engine/text": "Calibration sequences and training examples",
        "tests/engine/tune": "The tuning loop",
        "tests/engine/weights_only": "Jobs without a model: numbers, bytes that stay, resume, memory",
        "tests/formats": "Tensors and configurations of each format",
        "tests/formats/cards": "Model cards and what they inherit",
        "tests/formats/compressed_tensors": "Golden bytes of compressed-tensors, and what the format refuses",
        "tests/formats/gguf": "GGUF files against the package gguf",
        "tests/formats/gguf/architectures": "Names, rows and parts that llama.cpp has otherwise",
        "tests/formats/gguf/tokenizers": "Rules of tokenizers by their names in llama.cpp",
        "tests/methods": "Methods against their formulas",
        "tests/mutants": "Mistakes put into the sources one at a time, and whether the tests notice",
        "tests/numerics": "Rounding, codebooks and packing",
        "tests/numerics/blocks": "The search against brute force and llama.cpp's own quantizers",
        "tests/numerics/backends": "Kernels against their plain twins",
        "tests/numerics/floats": "FP8 and FP4 against other people's casts and brute force",
        "tests/store": "One suite on SQLite and on PostgreSQL",
        "tests/supervise": "Supervision, queue and sweep",
        "tests/supervise/tenancy": "Tokens, folders and metrics of a worker's jobs",
        "tests/supervise/spares": "Spares: lost, stale, out of memory, and looked at for secrets",
        "docs": "Documentation by reader; `make docs-site` builds it",
        "docs/guides": "One page per task",
        "docs/reference": "Tables to look up, made from the code",
        "docs/adr": "Decisions, one page each",
    }
)
"""A line for each folder, in the order of the tree. A folder without Python files is left out until it has one."""

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
        sets = "; MXFP4 and llama.cpp's up to 4 bits: ".join(_fields(own) for own in (p.spec, p.coarse) if own)
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
