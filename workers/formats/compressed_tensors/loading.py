"""The card's section "Load" of a checkpoint in the format of compressed-tensors, and what loading it needs."""

from collections.abc import Iterable, Mapping

from app.domain.formats import DENSE_WORDS, ExportFormat
from app.domain.methods import Scheme
from workers.formats.cards.loading import BASE, FOLDER, LOAD_VLLM, AdapterBase, Loading, model_lines
from workers.formats.cards.vllm import vllm_knowledge
from workers.formats.compressed_tensors.configuration import (
    decodes_to_bf16,
    misreads_experts,
    needs_loader,
    rounds_inputs,
    unpacks_on_load,
)
from workers.formats.native import LOAD_BITWRIGHT

LOAD_PACKED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer    # and: pip install "{package}"

model = AutoModelForCausalLM.from_pretrained("{folder}"{dtype})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_MIXED = """\
`from_pretrained` of transformers 5.23 does not load several schemes where one has zero points or blocks; the loader
makes an ordinary floating-point model from the same tensors."""

ABOUT_UNPACKING = """\
Linears of this checkpoint differ in their scheme, so do not load it with `CompressedTensorsConfig(dequantize=True)`
or its older name `run_compressed=False`: transformers 5.23 then reads every linear by the first group's scheme, with
wrong weights and without an error where the shapes happen to fit."""

ABOUT_EXPERTS = """\
Do not load it with `from_pretrained`: transformers 5.23 reads experts of this scheme wrongly, and not always with an
error. The loader makes an ordinary floating-point model from the same tensors."""

ABOUT_INPUTS = """\
Loaded so, the inputs of its linears are rounded as a server rounds them. {otherwise}"""

WEIGHTS_ALONE = "With `CompressedTensorsConfig(dequantize=True)` the weights are the same and inputs stay in 16 bits."

INPUTS_AS_THEY_ARE = """\
A server rounds the inputs of its linears, too; the loader's model leaves them in 16 bits."""

UNPACKED = """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""

UNPACKED_MIXED = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
model.hf_quantizer.compressor.decompress_model(model)"""

WITHOUT_ROUNDING = """
for module in model.modules():
    module.quantization_enabled = False     # inputs stay in 16 bits, or no gradient passes"""

UNPACKED_BY_LOADER = """\
from load_bitwright import load

model = load("{folder}")"""


def loading(about: Loading) -> list[str]:
    """The card's section "Load"."""
    schemes = about.schemes
    known, refusal = vllm_knowledge(ExportFormat.COMPRESSED_TENSORS, schemes, about.outputs, about.embeddings)
    vllm = f"vLLM does not load it, {refusal}." if refusal else LOAD_VLLM.format(folder=FOLDER, known=known)
    lines = [_load_packed(schemes), vllm]
    return model_lines(about, lines, "load the weights unpacked", _unpacked(schemes).format(folder=FOLDER))


def adapter_base(schemes: Mapping[str, Scheme]) -> AdapterBase:
    """The checkpoint, unpacked, as the base of the job's adapter."""
    package = "" if needs_loader(schemes) else f" (and `pip install '{package_needed(schemes.values())}'`)"
    where = f"The base is the `compressed-tensors` checkpoint of the same job, unpacked{package}:"
    _, refusal = vllm_knowledge(ExportFormat.COMPRESSED_TENSORS, schemes)
    return AdapterBase(where, _unpacked(schemes).format(folder=BASE), served=refusal is None)


def package_needed(schemes: Iterable[Scheme]) -> str:
    """The requirement of the package compressed-tensors, as pip reads it, that these linears need."""
    newer = any(DENSE_WORDS.holds(scheme) for scheme in schemes)
    return f"compressed-tensors>={DENSE_WORDS.version.removesuffix('.0')}" if newer else "compressed-tensors"


def package_warnings(schemes: Iterable[Scheme]) -> dict[str, str]:
    """Code and message for widths whose codes straddle words: loading them needs a newer package."""
    widths = sorted({scheme.bits for scheme in schemes if DENSE_WORDS.holds(scheme)})
    if not widths:
        return {}
    message = (
        f"compressed-tensors: for {', '.join(map(str, widths))} bits transformers needs the package compressed-tensors "
        f"{DENSE_WORDS.version} or newer; earlier releases pack them with gaps, and refuse the checkpoint"
    )
    return {"needs_newer_package": message}


def _load_packed(schemes: Mapping[str, Scheme]) -> str:
    distinct = set(schemes.values())
    rounds = rounds_inputs(distinct)
    if needs_loader(schemes):
        why = [ABOUT_EXPERTS] if misreads_experts(schemes) else [ABOUT_MIXED, ABOUT_UNPACKING]
        about = [LOAD_BITWRIGHT, *why, *([INPUTS_AS_THEY_ARE] if rounds else [])]
        return "\n\n".join(about).format(folder=FOLDER)
    several = len(distinct) > 1
    rounds, unpacks = rounds and not unpacks_on_load(distinct), unpacks_on_load(distinct)
    # A matrix product refuses two dtypes.
    dtype = ', dtype="bfloat16"' if not unpacks and any(map(decodes_to_bf16, distinct)) else ""
    about = [LOAD_PACKED.format(folder=FOLDER, package=package_needed(distinct), dtype=dtype)]
    about += [ABOUT_INPUTS.format(otherwise="" if several else WEIGHTS_ALONE).rstrip()] if rounds else []
    return "\n\n".join([*about, *([ABOUT_UNPACKING] if several else [])])


def _unpacked(schemes: Mapping[str, Scheme]) -> str:
    """The lines that turn packed linears into plain ones.

    transformers 5.23 unpacks every linear by the first group's scheme when it unpacks while loading; unpacked
    afterwards by compressed-tensors, each has its own.
    """
    if needs_loader(schemes):
        return UNPACKED_BY_LOADER
    if len(set(schemes.values())) == 1:
        return UNPACKED
    return UNPACKED_MIXED + (WITHOUT_ROUNDING if rounds_inputs(schemes.values()) else "")
