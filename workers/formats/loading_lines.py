"""The lines of a model card that load a checkpoint, by its format, its schemes and what else its job made."""

from collections.abc import Collection, Mapping

from app.domain.formats import ExportFormat, base_alone
from app.domain.methods import Scheme
from workers.formats.compressed_tensors import needs_loader
from workers.formats.runtimes import package_needed, vllm_knowledge, vllm_lora, vllm_row
from workers.formats.stored_linear import StoredLinear

FOLDER, BASE, ADAPTER = "path/to/this/folder", "path/to/the/base", "path/to/the/adapter"

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
The low-rank factors are added to the weights: what was measured below. `load("{folder}", merge=False)` gives the
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
transformers makes an ordinary floating-point model of it (and needs `pip install gguf`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True)
)
tokenizer = AutoTokenizer.from_pretrained("{folder}", gguf_file="model.gguf")
```"""

ABOUT_GGUF_BASE = """\
**This is the quantized base alone.** The low-rank factors that belong to it are the `peft` checkpoint of the same job;
llama.cpp's `convert_lora_to_gguf.py` converts such adapters. The figures below are those of both together."""

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

ABOUT_BASE = """\
**This is the quantized base alone.** The low-rank factors that belong to it are the `peft` checkpoint of the same job.
The figures below are those of both together:"""

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

NATIVE_BASE = """\
from load_bitwright import load          # the file in the `native` checkpoint of the same job

model = load("{folder}", merge=False)"""


def loading_lines(
    export_format: ExportFormat, linears: Mapping[str, StoredLinear], formats: Collection[ExportFormat]
) -> list[str]:
    """Paragraphs that say how to load a checkpoint of that format, whose job has `formats` in all.

    linears   every quantized linear by module name
    """
    schemes = {name: linear.scheme for name, linear in linears.items()}
    if export_format is ExportFormat.PEFT:
        where, load = _base(schemes, formats)
        serve = _serve_adapter(linears, formats)
        return [f"{where}\n\n{WITH_ADAPTER.format(load=load, adapter=FOLDER)}", ABOUT_ADAPTER, *serve]
    if export_format is ExportFormat.NATIVE:
        corrected = any(linear.low_rank for linear in linears.values())
        return [
            LOAD_BITWRIGHT.format(folder=FOLDER),
            ABOUT_NATIVE,
            *([ABOUT_CORRECTIONS.format(folder=FOLDER)] if corrected else []),
        ]
    if export_format is ExportFormat.GGUF:
        about = [ABOUT_GGUF_BASE] if base_alone(formats) else []
        return [*about, LOAD_LLAMA_CPP.format(folder=FOLDER), LOAD_GGUF.format(folder=FOLDER)]
    if export_format is ExportFormat.MERGED:
        known = ", " + vllm_row(ExportFormat.MERGED).known()
        plain, vllm = LOAD_PLAIN.format(folder=FOLDER), LOAD_VLLM.format(folder=FOLDER, known=known)
        how, load = "it needs nothing else", PLAIN.format(folder=FOLDER)
    else:
        plain, vllm = _packed_loading(schemes), _vllm(schemes)
        how, load = "load the weights unpacked", _unpacked(schemes).format(folder=FOLDER)
    if base_alone(formats):
        return [f"{ABOUT_BASE}\n\n{WITH_ADAPTER.format(load=load, adapter=ADAPTER)}", f"By itself:\n\n{plain}", vllm]
    return [plain, vllm, LORA.format(how=how, load=load)]


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
