"""The section "Load" of packed formats that other packages read: by the loader beside the files, then by those."""

from collections.abc import Callable, Mapping
from pathlib import Path

from app.domain.format_info import TRANSFORMERS
from app.domain.formats import ExportFormat
from app.domain.fused_shapes import EXPERT
from app.domain.methods import Scheme
from app.domain.runtimes import RuntimeSupport, described
from workers.formats.cards.loading import BASE, FOLDER, LOAD_VLLM, AdapterBase, Lines, Loading, model_lines
from workers.formats.cards.vllm import vllm_knowledge

LOADER = Path(__file__).with_name("load_packed.py")
"""Copied into every such checkpoint."""

LOAD = """\
```python
from load_packed import load             # the file in this folder; needs torch, safetensors and transformers
from transformers import AutoTokenizer

model = load("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
ABOUT = "The loader makes an ordinary floating-point model of the packed weights."

ITSELF = """\
from load_packed import load             # the file in that folder; needs torch, safetensors and transformers

model = load("{folder}")"""

PACKAGES: Mapping[str, str] = {
    "gptqmodel": "transformers runs it packed by `from_pretrained`, with the {packages} ({known}).",
    "bitsandbytes": "transformers runs it packed by `from_pretrained`, with the {packages} ({known}).",
    "mlx-lm": "mlx-lm runs it packed: `mlx_lm.generate --model {folder}` ({known}; {note}).",
}
EXPERTS = """\
`from_pretrained` does not run it packed: transformers {release} has the experts of a layer in one tensor, and {runtime}
packs linears, so that packed experts find no place in the model and are refused or drawn at random."""
NEEDED: Mapping[ExportFormat, str] = {
    ExportFormat.GPTQ: "packages `gptqmodel` and `optimum`",
    ExportFormat.GPTQ_V2: "packages `gptqmodel` and `optimum`",
    ExportFormat.AWQ: "packages `gptqmodel` and `accelerate`",
    ExportFormat.BITSANDBYTES: "packages `bitsandbytes` and `accelerate`",
}


def sections(name: ExportFormat) -> Lines:
    """The function that makes the section of a format's cards."""

    def loading(about: Loading) -> list[str]:
        lines = [LOAD.format(folder=FOLDER), ABOUT, *_packed(name, about.schemes)]
        return model_lines(about, lines, "load it the same way", ITSELF.format(folder=FOLDER))

    return loading


def base_of(name: ExportFormat) -> Callable[[Mapping[str, Scheme]], AdapterBase]:
    """The function that describes a format's checkpoint as the base of the job's adapter."""

    def adapter_base(_schemes: Mapping[str, Scheme]) -> AdapterBase:
        where = f"The base is the `{name.value}` checkpoint of the same job:"
        return AdapterBase(where, ITSELF.format(folder=BASE))

    return adapter_base


def _packed(name: ExportFormat, schemes: Mapping[str, Scheme]) -> list[str]:
    """A paragraph for each runtime that reads the words themselves."""
    found = [
        _paragraph(name, row, schemes) for row in name.info.runtimes if row.runtime not in ("transformers", "vllm")
    ]
    if any(row.runtime == "vllm" for row in name.info.runtimes):
        known, refusal = vllm_knowledge(name, schemes)
        found.append(f"vLLM does not load it, {refusal}." if refusal else LOAD_VLLM.format(folder=FOLDER, known=known))
    return found


def _paragraph(name: ExportFormat, row: RuntimeSupport, schemes: Mapping[str, Scheme]) -> str:
    refused = sorted({described(scheme) for scheme in schemes.values() if not row.loads(scheme)})
    if refused:
        return f"{row.runtime} does not load it, {row.known()}: not {refused[0]}."
    if name in NEEDED and any(EXPERT.search(linear) for linear in schemes):
        return EXPERTS.format(release=TRANSFORMERS, runtime=row.runtime)
    packages = NEEDED.get(name, "")
    return PACKAGES[row.runtime].format(folder=FOLDER, known=row.known(), note=row.note, packages=packages)
