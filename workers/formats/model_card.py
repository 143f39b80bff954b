"""README.md of a checkpoint: what it is, the lines that load it, and how close it is to the original."""

import re
from collections import Counter
from collections.abc import Collection, Mapping

import yaml

from app.domain.formats import ExportFormat
from app.domain.methods import METHODS, Form
from app.domain.report import Quality, Report, SizeReport
from app.domain.sources import HUB_ID, UPLOAD_ID
from workers.formats.loading_lines import loading_lines
from workers.formats.stored_linear import StoredLinear


def model_card(
    report: Report,
    export_format: ExportFormat,
    linears: Mapping[str, StoredLinear],
    licence: str | None,
    formats: Collection[ExportFormat] = (),
) -> str:
    """The card as Markdown with the Hub's front matter.

    linears   every quantized linear by module name
    licence   name of the licence file beside the card, if the source had one
    formats   all of the job's
    """
    quality = report.quality_of(export_format)
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(report, export_format), sort_keys=False)}---",
        f"# {_title(report)}",
        _summary(report, export_format, linears),
        "## Load",
        *loading_lines(export_format, linears, formats),
        *(["## Quality", _quality_table(quality)] if quality else []),
        "## Size",
        _size(report),
        "## Provenance",
        _provenance(report, licence),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: Report, export_format: ExportFormat) -> dict[str, object]:
    adapter = export_format is ExportFormat.PEFT
    matter: dict[str, object] = {
        "library_name": "peft" if adapter else "transformers",
        "tags": ["bitwright", export_format.value],
    }
    # The Hub would load an adapter onto the model that is named here, and this one's base is another.
    if _is_hub_id(report.model.source) and not adapter:
        matter |= {"base_model": report.model.source, "base_model_relation": "quantized"}
    return matter


def _is_hub_id(source: str) -> bool:
    return bool(re.match(HUB_ID, source)) and not re.match(UPLOAD_ID, source)


def _title(report: Report) -> str:
    name = report.model.source.rstrip("/").rpartition("/")[2]
    return f"{name}, {report.size.bits_per_weight:.2f} bits per weight"


def _summary(report: Report, export_format: ExportFormat, linears: Mapping[str, StoredLinear]) -> str:
    info = METHODS[report.method]
    paper = f" ([arXiv {info.paper}](https://arxiv.org/abs/{info.paper}))" if info.paper else ""
    lines = [f"Quantized by Bitwright {report.version} with {info.title}{paper}, format `{export_format.value}`.", ""]
    lines += ["| linears | bits | group size | zero point | low-rank factors |", "|---|---|---|---|---|"]
    for linear, count in Counter(linears.values()).most_common():
        group = "per channel" if linear.group_size == -1 else str(linear.group_size)
        low_rank = linear.low_rank
        factors = "none" if low_rank is None else f"rank {low_rank.rank}, alpha {low_rank.alpha:g}"
        lines.append(f"| {count} | {linear.bits} | {group} | {_zero_point(linear)} | {factors} |")
    return "\n".join(lines)


def _zero_point(linear: StoredLinear) -> str:
    if linear.form is Form.CODEBOOK:
        return "none: codes index a codebook"
    return "an offset of each group" if linear.offset else "fixed" if linear.symmetric else "of each group"


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
        f"the native format stores them: {size.bits_per_weight:.3f} bits for each quantized weight{_parts(size)}, "
        f"and {size.bits_per_weight_model:.3f} for each weight of the model."
    )


def _parts(size: SizeReport) -> str:
    """What the bits of a weight are made of, as far as there is something."""
    if size.parts is None:
        return ", scales included"
    named = {name: bits for name, bits in size.parts.model_dump().items() if bits}
    return " (" + ", ".join(f"{name} {bits:.3f}" for name, bits in named.items()) + ")"


def _provenance(report: Report, licence: str | None) -> str:
    revision = f" at revision `{report.model.revision}`" if report.model.revision else ""
    lines = [f"- Source: `{report.model.source}`{revision}, {report.model.architecture}, {report.model.dtype}"]
    if report.calibration is not None:
        text = report.calibration
        size = f"{text.num_samples} sequences of {text.sequence_length} tokens"
        lines.append(f"- Calibration: {size} of `{text.source}` (sha256 `{text.sha256[:16]}`)")
    if report.base is not None:
        lines.append(f"- Quantized by job `{report.base.job_id}`, whose codes these are; this job finetuned")
    if report.scales is not None and report.scales.kept:
        lines.append(f"- Scales tuned end to end in {report.scales.steps} steps, codes fixed")
    lines.append(f"- Seed {report.seed}; everything measured is in `report.json`")
    lines.append(f"- Licence: the source's{f', see `{licence}`' if licence else ''}")
    return "\n".join(lines)
