"""README.md of a checkpoint: what it is, the lines that load it, and how close it is to the original."""

import re
from collections import Counter
from collections.abc import Mapping

import yaml

from app.domain.formats import ExportFormat
from app.domain.methods import METHODS, Scheme
from app.domain.report import Quality, Report
from app.domain.sources import HUB_ID, UPLOAD_ID
from workers.formats.compressed_tensors import needs_loader
from workers.formats.runtimes import vllm_refusals

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

LOAD_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer    # and: pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

ABOUT_MIXED = """\
`from_pretrained` of transformers 5.23 does not load mixed widths with zero points; the loader makes an ordinary
floating-point model from the same tensors."""

LOAD_VLLM = """\
vLLM, by its rules (not tested here):

```sh
vllm serve {folder}
```"""

LORA = """\
To train a LoRA on it with peft, load the weights unpacked:

```python
from peft import LoraConfig, get_peft_model
{load}
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
```"""

ABOUT_UNPACKING = """\
Linears of this checkpoint differ in width or group, so do not load it with `CompressedTensorsConfig(dequantize=True)`
or `run_compressed=False`: transformers 5.23 then reads every linear by the first group's scheme, with wrong weights
and without an error where the shapes happen to fit."""

LORA_LOAD = """\
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained(
    "{folder}", quantization_config=CompressedTensorsConfig(run_compressed=False)
)"""

LORA_LOAD_MIXED = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
model.hf_quantizer.compressor.decompress_model(model)"""

LORA_LOAD_BITWRIGHT = """\
from load_bitwright import load

model = load("{folder}")"""


def model_card(report: Report, export_format: ExportFormat, schemes: Mapping[str, Scheme], licence: str | None) -> str:
    """The card as Markdown with the Hub's front matter.

    schemes   every quantized linear by module name
    licence   name of the licence file beside the card, if the source had one
    """
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(report, export_format), sort_keys=False)}---",
        f"# {_title(report)}",
        _summary(report, export_format, schemes),
        "## Load",
        *_loading(export_format, schemes),
        *(["## Quality", _quality_table(report.quality)] if report.quality else []),
        "## Size",
        _size(report),
        "## Provenance",
        _provenance(report, licence),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: Report, export_format: ExportFormat) -> dict[str, object]:
    matter: dict[str, object] = {"library_name": "transformers", "tags": ["bitwright", export_format.value]}
    if _is_hub_id(report.model.source):
        matter |= {"base_model": report.model.source, "base_model_relation": "quantized"}
    return matter


def _is_hub_id(source: str) -> bool:
    return bool(re.match(HUB_ID, source)) and not re.match(UPLOAD_ID, source)


def _title(report: Report) -> str:
    name = report.model.source.rstrip("/").rpartition("/")[2]
    return f"{name}, {report.size.bits_per_weight:.2f} bits per weight"


def _summary(report: Report, export_format: ExportFormat, schemes: Mapping[str, Scheme]) -> str:
    info = METHODS[report.method]
    paper = f" ([arXiv {info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper else ""
    lines = [f"Quantized by Bitwright {report.version} with {info.title}{paper}, format `{export_format.value}`.", ""]
    lines += ["| linears | bits | group size | zero point |", "|---|---|---|---|"]
    for scheme, count in Counter(schemes.values()).most_common():
        group = "per channel" if scheme.group_size == -1 else str(scheme.group_size)
        lines.append(f"| {count} | {scheme.bits} | {group} | {'fixed' if scheme.symmetric else 'of each group'} |")
    return "\n".join(lines)


def _loading(export_format: ExportFormat, schemes: Mapping[str, Scheme]) -> list[str]:
    folder = "path/to/this/folder"
    if export_format is ExportFormat.NATIVE:
        return [LOAD_BITWRIGHT.format(folder=folder), ABOUT_NATIVE]
    refusals = vllm_refusals(schemes)
    vllm = f"vLLM does not load it, by its rules: {refusals[0]}." if refusals else LOAD_VLLM.format(folder=folder)
    if needs_loader(schemes.values()):
        plain, lora = f"{LOAD_BITWRIGHT}\n\n{ABOUT_MIXED}\n\n{ABOUT_UNPACKING}", LORA_LOAD_BITWRIGHT
    elif len(set(schemes.values())) > 1:
        # transformers 5.23 unpacks every linear by the first group's scheme when it unpacks while loading; unpacked
        # afterwards by compressed-tensors, each has its own.
        plain, lora = f"{LOAD_TRANSFORMERS}\n\n{ABOUT_UNPACKING}", LORA_LOAD_MIXED
    else:
        plain, lora = LOAD_TRANSFORMERS, LORA_LOAD
    return [plain.format(folder=folder), vllm, LORA.format(load=lora.format(folder=folder))]


def _quality_table(quality: Quality) -> str:
    text = quality.text
    return "\n".join(
        [
            f"On {text.tokens} tokens of `{text.source}` that did not calibrate it (sha256 `{text.sha256[:16]}`):",
            "",
            "| | original | quantized |",
            "|---|---|---|",
            f"| perplexity | {quality.perplexity_original:.4f} | {quality.perplexity:.4f} |",
            f"| KL divergence, nats a token | 0 | {quality.kl_divergence:.5f} |",
            f"| same most likely token | 100 % | {100 * quality.top1_agreement:.2f} % |",
        ]
    )


def _size(report: Report) -> str:
    size = report.size
    return (
        f"{size.bytes_original / 1e6:.1f} MB of tensors before, {size.bytes_quantized / 1e6:.1f} MB after, counted as "
        f"the native format stores them: {size.bits_per_weight:.3f} bits for each quantized weight, scales included, "
        f"and {size.bits_per_weight_model:.3f} for each weight of the model."
    )


def _provenance(report: Report, licence: str | None) -> str:
    revision = f" at revision `{report.model.revision}`" if report.model.revision else ""
    lines = [f"- Source: `{report.model.source}`{revision}, {report.model.architecture}, {report.model.dtype}"]
    if report.calibration is not None:
        text = report.calibration
        size = f"{text.num_samples} sequences of {text.sequence_length} tokens"
        lines.append(f"- Calibration: {size} of `{text.source}` (sha256 `{text.sha256[:16]}`)")
    if report.scales is not None and report.scales.kept:
        lines.append(f"- Scales tuned end to end in {report.scales.steps} steps, codes fixed")
    lines.append(f"- Seed {report.seed}; everything measured is in `report.json`")
    lines.append(f"- Licence: the source's{f', see `{licence}`' if licence else ''}")
    return "\n".join(lines)
