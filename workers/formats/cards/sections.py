"""Paragraphs of a card that come from the report alone: how close to the original, what was learned, and from what.

Figures are of the files that were measured: `figures_of` is the one place that says whose they are.
"""

from collections.abc import Iterator
from pathlib import PurePath

from app.domain.adapters import ADAPTERS
from app.domain.formats import ExportFormat
from bitwright.formats import ADAPTER_FOLDER
from bitwright.report import AdapterReport, BaseTraining, Figures, FinetuningReport, Quality, Report
from workers.formats.cards.identity import Part, adapter_title


def figures_of(report: Report, export_format: ExportFormat | None) -> Quality | None:
    """What was measured of a format's files, with the adapter where that is apart; None: nothing was.

    export_format   None: of the adapter file with its base
    """
    return report.quality_of(ADAPTER_FOLDER if export_format is None else export_format)


def code(text: str) -> str:
    """A user's words as Markdown code, in one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def source_name(source: str) -> str:
    """A source as Markdown code: of a folder or file its name, since its path is of one machine."""
    return code(PurePath(source).name if PurePath(source).is_absolute() else source)


def quality(report: Report, part: Part, export_format: ExportFormat | None) -> list[str]:
    """The section on the evaluation; nothing where there was none."""
    found = figures_of(report, export_format)
    if found is None:
        return []
    text, trained = found.text, report.finetuning is not None
    apart = "neither calibrated nor trained it" if trained else "did not calibrate it"
    whose = "Of this folder's files, on" if part is Part.WHOLE else "**Of base and adapter together** (see Load), on"
    return [
        "## Quality",
        "\n".join(
            [
                f"{whose} {text.tokens} tokens of {source_name(text.source)} that {apart} "
                f"(sha256 `{text.sha256[:16]}`):",
                "",
                f"| | original | quantized{' and finetuned' if trained else ''} |",
                "|---|---|---|",
                f"| perplexity | {found.perplexity_original:.4f} | {found.perplexity:.4f} |",
                f"| KL divergence, nats a token | 0 | {found.kl_divergence:.5f} |",
                f"| same most likely token | 100 % | {100 * found.top1_agreement:.2f} % |",
            ]
        ),
    ]


def reference_lines(reference: Figures | None) -> list[str]:
    """A paragraph below the table of the quality; none where nothing was measured."""
    if reference is None:
        return []
    return [
        f"Round to nearest with the same scheme, on the same text: perplexity {reference.perplexity:.4f}, "
        f"KL divergence {reference.kl_divergence:.5f}, same most likely token {100 * reference.top1_agreement:.2f} %."
    ]


def training(report: Report) -> list[str]:
    """The section on what was finetuned, by this job and by those that it started from; nothing where nothing was."""
    told = report.finetuning
    earlier = () if report.base_job is None else report.base_job.training
    if told is None and not earlier:
        return []
    paragraphs = [_earlier(one) for one in earlier]
    if told is not None:
        about = "An adapter" if report.adapter is None else _adapter(report.adapter)
        paragraphs.append("\n".join([f"{about} was trained beside the quantized weights.", "", *_run(told)]))
        paragraphs += [] if report.adapter is None or report.adapter.merge is None else [_merge(report.adapter)]
    return ["## Training", *paragraphs]


def _earlier(one: BaseTraining) -> str:
    where = "lies folded in the quantized weights" if one.folded else "was the start of this job's training"
    return (
        f"Earlier: {adapter_title(one.adapter)} on {source_name(one.text.source)} (sha256 `{one.text.sha256[:16]}`), "
        f"{one.steps} steps; it {where}."
    )


def _adapter(adapter: AdapterReport) -> str:
    info, (least, most) = ADAPTERS.get(adapter.kind), adapter.inner_ranks
    name = adapter_title(adapter.kind)
    paper = f" ([arXiv {info.paper}](https://arxiv.org/abs/{info.paper}))" if info is not None else ""
    inner = "" if least == most == adapter.rank else f", inner ranks {least} to {most}"
    return f"{name}{paper}, rank {adapter.rank}{inner}, {adapter.parameters} parameters,"


def _run(told: FinetuningReport) -> Iterator[str]:
    text = told.text
    yield "| | |"
    yield "|---|---|"
    size = f"{text.num_samples} sequences of at most {text.sequence_length} tokens, {text.tokens} tokens"
    yield f"| dataset | {source_name(text.source)} (sha256 `{text.sha256[:16]}`): {size} |"
    yield f"| steps | {_steps(told)} |"
    if told.learning_rate is not None:
        yield f"| learning rate | {told.learning_rate:g} |"
    if told.losses:
        first, last = told.losses[0].loss, told.losses[-1].loss
        yield f"| training loss, nats a token | {first:.4f} at first, {last:.4f} at last |"
    if told.loss_before is not None and told.loss_after is not None:
        held_out = f"loss on {told.held_out_sequences} held-out sequences"
        ships = "" if told.loss_shipped is None else f", {told.loss_shipped:.4f} with the weights that ship"
        yield f"| {held_out} | {told.loss_before:.4f} before, {told.loss_after:.4f} after{ships} |"
    else:
        yield "| held-out loss | not measured: no sequence was held out |"


def _steps(told: FinetuningReport) -> str:
    stopped = f" of {told.steps}, stopped early" if told.stopped_early else ""
    kept = f", the parameters after {told.steps_kept} kept" if told.steps_kept != told.steps_done else ""
    batch = f", {told.batch_size} sequences each" if told.batch_size is not None else ""
    read = f", {told.tokens_read} tokens read" if told.tokens_read is not None else ""
    return f"{told.steps_done}{stopped}{kept}{batch}{read}"


def _merge(adapter: AdapterReport) -> str:
    merge = adapter.merge
    if merge is None:
        return ""
    where = "integer zero points" if merge.rounded else "the offset of each group"
    kept = "are those of the quantization, bit for bit" if merge.codes_and_scales_kept else "have changed"
    return (
        f"It is folded into {where} of {merge.linears} linears; codes and scales {kept}. The largest error that the "
        f"fold makes of a weight is {merge.error_shipped:.3g}."
    )
