"""The lines of a model card that load a checkpoint, by its format, its schemes and what else its job made."""

from collections.abc import Collection, Mapping

from app.domain.format_rules import base_alone
from app.domain.formats import ExportFormat
from app.domain.methods import Scheme
from workers.formats.cards.runtimes import package_needed, vllm_knowledge, vllm_lora, vllm_row
from workers.formats.compressed_tensors import needs_loader
from workers.formats.gguf.read_back import Reading
from workers.formats.stored_linear import StoredLinear

FOLDER, BASE, ADAPTER = "path/to/this/folder", "path/to/the/base", "path/to/the/adapter"
SOURCE = "path/to/the/original/model"

LOAD_BITWRIGHT = """\
```python
from load_bitwright import load          # the file in this folder; needs torch, safetensors and transformers
from transformers import AutoTokenizer

model = load("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_NATIVE = """\
The loader makes an ordinary floating-point model. The weight files hold the codes and scales as they were made; ask
Bitwright for another format to run them packed."""

ABOUT_CORRECTIONS = """\
The low-rank factors are added to the weights, which is what was measured. `load("{folder}", merge=False)` gives the
quantized base alone, for an adapter in the format `peft`."""

LOAD_PACKED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer    # and: pip install "{package}"

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

LOAD_PLAIN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_MIXED = """\
`from_pretrained` of transformers 5.23 does not load mixed widths with zero points; the loader makes an ordinary
floating-point model from the same tensors."""

LOAD_VLLM = """\
vLLM{known}:

```sh
vllm serve {folder}
```"""

SERVE_ADAPTER = """\
vLLM serves both as its model `adapter`, {known}:

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}
```"""

LOAD_LLAMA_CPP = """\
llama.cpp, and what is built on it:

```sh
llama-cli -m {folder}/model.gguf
```"""

LOAD_GGUF = """\
transformers makes an ordinary floating-point model of it (and needs `pip install gguf`), in float32 unless a dtype is
given:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype="{dtype}"
)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
```"""

ABOUT_GGUF_IN_TRANSFORMERS = """\
Not with transformers: 5.23 makes another model of this file, without an error. Of the original {what}. Ask for the
format `merged` to load it there."""

ABOUT_GGUF_TOKENIZER = """\
transformers 5.23 would make another tokenizer of this file: take the original model's, as the lines do."""

ABOUT_GGUF_BASE = """\
llama.cpp's `convert_lora_to_gguf.py` converts the `peft` checkpoint, which `llama-cli --lora` then adds."""

ABOUT_GGUF_APART = """\
llama.cpp has no adapters of this kind."""

LORA = """\
To train a LoRA on it with peft, {how}:

```python
from peft import LoraConfig, get_peft_model
{load}
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
```"""

WITH_ADAPTER = """\
```python
from peft import PeftModel
{load}
model = PeftModel.from_pretrained(model, "{adapter}")
```"""

ABOUT_ADAPTER = """\
With `is_trainable=True` training goes on from the point that was measured. The adapter belongs to the quantized base,
not to the original model, on which it would load without an error and be wrong."""

ABOUT_NAMED_BASE = """\
`base_model_name_or_path` in `adapter_config.json` names `{model}`, the model that was quantized, because the Hub and
peft look an adapter's base up by that. What takes it from there without asking, such as `AutoPeftModelForCausalLM`,
loads the original weights, which is not what was measured."""

ABOUT_BASE = """\
**This is the quantized base alone.** The low-rank factors that belong to it are the `peft` checkpoint of the same job.
What the job made, and what was measured of it, is both together:"""

ABOUT_BASE_APART = """\
**This is the quantized base alone.** The {adapter} that was trained beside it is the folder `adapter` of the same job,
with a loader of its own: stock peft has no such adapters. What the job made, and what was measured of it, is both
together:"""

ABOUT_ADAPTER_FILE = """\
It belongs to the quantized base that it was trained beside: the job's `native` checkpoint without its factors. On the
original model it is wrong. Beside the linears of the base it computes what was measured:"""

ABOUT_MERGING = """\
`merge` of the same file adds it to the linears' weights instead, rounded once to their dtype."""

ABOUT_FOLDED = """\
**The job's checkpoints have this adapter in their weights already: attached to them it would act twice.** It belongs to
the quantized base that it was trained beside, which is the `native` checkpoint of {where}:"""

WITH_ADAPTER_FILE = """\
```python
import sys

sys.path.insert(0, "{adapter}")          # load_adapter.py is the file in that folder
from load_adapter import attach
{load}
attach(model, "{adapter}")
```"""

BY_ITSELF = """\
By itself, which is not what was measured:"""

ABOUT_UNPACKING = """\
Linears of this checkpoint differ in width or group, so do not load it with `CompressedTensorsConfig(dequantize=True)`
or its older name `run_compressed=False`: transformers 5.23 then reads every linear by the first group's scheme, with
wrong weights and without an error where the shapes happen to fit."""

UNPACKED = """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""

UNPACKED_MIXED = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
model.hf_quantizer.compressor.decompress_model(model)"""

UNPACKED_BY_LOADER = """\
from load_bitwright import load

model = load("{folder}")"""

PLAIN = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")"""

NATIVE_ITSELF = """\
from load_bitwright import load          # the file in this folder; needs torch, safetensors and transformers

model = load("{folder}")"""

NATIVE_BASE = """\
from load_bitwright import load          # the file in the `native` checkpoint of the same job

model = load("{folder}", merge=False)"""


def loading_lines(
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    formats: Collection[ExportFormat],
    *,
    reading: Reading | None = None,
    apart: str | None = None,
    model_id: str | None = None,
) -> list[str]:
    """Paragraphs that say how to load a checkpoint of that format, whose job has `formats` in all.

    linears   every quantized linear by module name
    reading   of a GGUF file: what transformers makes of it
    apart     name of the adapter that was measured with it and lies in the job's adapter file alone; None: none does
    model_id  of the model that was quantized, if it is on the Hub
    """
    schemes = {name: linear.scheme for name, linear in linears.items()}
    if export_format is ExportFormat.PEFT:
        where, load = _base(schemes, formats)
        named = [ABOUT_NAMED_BASE.format(model=model_id)] if model_id else []
        serve = _serve_adapter(linears, formats)
        return [f"{where}\n\n{WITH_ADAPTER.format(load=load, adapter=FOLDER)}", ABOUT_ADAPTER, *named, *serve]
    if export_format is ExportFormat.NATIVE:
        return _native(linears, apart)
    if export_format is ExportFormat.GGUF:
        about, transformers = _gguf_base(formats, apart), _gguf_in_transformers(linears, reading or Reading())
        return [*about, LOAD_LLAMA_CPP.format(folder=FOLDER), *transformers]
    if export_format is ExportFormat.MERGED:
        known = ", " + vllm_row(ExportFormat.MERGED).known()
        plain, vllm = LOAD_PLAIN.format(folder=FOLDER), LOAD_VLLM.format(folder=FOLDER, known=known)
        how, load = "it needs nothing else", PLAIN.format(folder=FOLDER)
    else:
        plain, vllm = _packed_loading(schemes), _vllm(schemes)
        how, load = "load the weights unpacked", _unpacked(schemes).format(folder=FOLDER)
    if base_alone(formats):
        return [f"{ABOUT_BASE}\n\n{WITH_ADAPTER.format(load=load, adapter=ADAPTER)}", BY_ITSELF, plain, vllm]
    if apart is not None:
        return [_with_adapter_file(apart, load), BY_ITSELF, plain, vllm]
    return [plain, vllm, LORA.format(how=how, load=load)]


def _gguf_in_transformers(linears: Mapping[str, StoredLinear], reading: Reading) -> list[str]:
    """The lines for transformers, where it makes the model of the file that the file holds."""
    if reading.other_model:
        return [ABOUT_GGUF_IN_TRANSFORMERS.format(what="; ".join(reading.other_model))]
    dtype = min({linear.dtype for linear in linears.values()}, default="float32")
    tokenizer = f'"{SOURCE}"' if reading.other_tokens else f'"{FOLDER}", gguf_file="model.gguf"'
    lines = LOAD_GGUF.format(folder=FOLDER, dtype=dtype, tokenizer=tokenizer)
    return [lines, *([ABOUT_GGUF_TOKENIZER] if reading.other_tokens else [])]


def adapter_lines(folded: bool, earlier_job: str | None) -> list[str]:
    """Paragraphs that say how to load the adapter file.

    folded        whether the job's checkpoints hold the adapter in their weights
    earlier_job   whose result it was trained beside, if not this job's own quantization
    """
    lines = WITH_ADAPTER_FILE.format(adapter=FOLDER, load=NATIVE_BASE.format(folder=BASE))
    if not folded:
        return [f"{ABOUT_ADAPTER_FILE}\n\n{lines}", ABOUT_MERGING]
    where = f"the job `{earlier_job}`" if earlier_job else "a job of the same request without `merge`"
    return [f"{ABOUT_FOLDED.format(where=where)}\n\n{lines}"]


def _native(linears: Mapping[str, StoredLinear], apart: str | None) -> list[str]:
    loading = [LOAD_BITWRIGHT.format(folder=FOLDER), ABOUT_NATIVE]
    if apart is not None:
        return [_with_adapter_file(apart, NATIVE_ITSELF.format(folder=FOLDER)), BY_ITSELF, *loading]
    corrected = any(linear.low_rank for linear in linears.values())
    return [*loading, *([ABOUT_CORRECTIONS.format(folder=FOLDER)] if corrected else [])]


def _gguf_base(formats: Collection[ExportFormat], apart: str | None) -> list[str]:
    """What belongs to a GGUF file that holds the base alone, and how both are loaded; nothing if it holds all."""
    load = NATIVE_BASE.format(folder=BASE)
    if base_alone(formats):
        lines = WITH_ADAPTER.format(load=load, adapter=ADAPTER)
        return [f"{ABOUT_BASE}\n\n{lines}", ABOUT_GGUF_BASE, BY_ITSELF]
    if apart is not None:
        lines = WITH_ADAPTER_FILE.format(load=load, adapter=ADAPTER)
        return [f"{ABOUT_BASE_APART.format(adapter=apart)}\n\n{lines}", ABOUT_GGUF_APART, BY_ITSELF]
    return []


def _with_adapter_file(apart: str, load: str) -> str:
    lines = WITH_ADAPTER_FILE.format(load=load, adapter=ADAPTER)
    return f"{ABOUT_BASE_APART.format(adapter=apart)}\n\n{lines}"


def _base(schemes: Mapping[str, Scheme], formats: Collection[ExportFormat]) -> tuple[str, str]:
    """Where the base of an adapter is, and the lines that load it."""
    if ExportFormat.MERGED in formats:
        return "The base is the `merged` checkpoint of the same job:", PLAIN.format(folder=BASE)
    if ExportFormat.COMPRESSED_TENSORS in formats:
        package = "" if needs_loader(schemes.values()) else f" (and `pip install '{package_needed(schemes.values())}'`)"
        where = f"The base is the `compressed-tensors` checkpoint of the same job, unpacked{package}:"
        return where, _unpacked(schemes).format(folder=BASE)
    return "The base is in the `native` checkpoint of the same job:", NATIVE_BASE.format(folder=BASE)


def _packed_loading(schemes: Mapping[str, Scheme]) -> str:
    if needs_loader(schemes.values()):
        return f"{LOAD_BITWRIGHT}\n\n{ABOUT_MIXED}\n\n{ABOUT_UNPACKING}".format(folder=FOLDER)
    about = f"\n\n{ABOUT_UNPACKING}" if len(set(schemes.values())) > 1 else ""
    return LOAD_PACKED.format(folder=FOLDER, package=package_needed(schemes.values())) + about


def _unpacked(schemes: Mapping[str, Scheme]) -> str:
    """The lines that make plain linears of packed ones.

    transformers 5.23 unpacks every linear by the first group's scheme when it unpacks while loading; unpacked
    afterwards by compressed-tensors, each has its own.
    """
    if needs_loader(schemes.values()):
        return UNPACKED_BY_LOADER
    return UNPACKED_MIXED if len(set(schemes.values())) > 1 else UNPACKED


def _vllm(schemes: Mapping[str, Scheme]) -> str:
    known, refusal = vllm_knowledge(schemes)
    return f"vLLM does not load it, {refusal}." if refusal else LOAD_VLLM.format(folder=FOLDER, known=known)


def _serve_adapter(linears: Mapping[str, StoredLinear], formats: Collection[ExportFormat]) -> list[str]:
    """The line that serves base and adapter in vLLM, where it loads the base."""
    if not {ExportFormat.MERGED, ExportFormat.COMPRESSED_TENSORS} & set(formats):
        return []
    if ExportFormat.MERGED not in formats and vllm_knowledge({n: one.scheme for n, one in linears.items()})[1]:
        return []
    known, rank = vllm_lora([one.low_rank for one in linears.values() if one.low_rank is not None])
    return [] if rank is None else [SERVE_ADAPTER.format(base=BASE, adapter=FOLDER, rank=rank, known=known)]
