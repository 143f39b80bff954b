"""Paragraphs of a card that come from the report alone: quality against the original, and training.

Figures are of the files that were measured: `figures_of` is the one place that selects them.
"""

from collections.abc import Iterator
from pathlib import PurePath

from app.domain.adapters import ADAPTERS
from app.domain.formats import ExportFormat
from bitwright.formats import ADAPTER_FOLDER
from bitwright.report import AdapterReport, BaseTraining, Figures, FinetuningReport, Quality, Report
from workers.formats.cards.identity import Contents, adapter_title


def figures_of(report: Report, export_format: ExportFormat | None) -> Quality | None:
    """Measured quality of a format's files, with the adapter if that is apart; None without an evaluation.

    export_format   None: the adapter file with its base
    """
    return report.quality_of(ADAPTER_FOLDER if export_format is None else export_format)


def code(text: str) -> str:
    """Text from a user as Markdown code, in one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def source_name(source: str) -> str:
    """A source as Markdown code: the name of a folder or file, since its path belongs to one machine."""
    return code(PurePath(source).name if PurePath(source).is_absolute() else source)


def quality(report: Report, contents: Contents, export_format: ExportFormat | None) -> list[str]:
    """The section on the evaluation; empty without one."""
    measured = figures_of(report, export_format)
    if measured is None:
        return []
    text, trained = measured.text, report.finetuning is not None
    apart = "neither calibrated nor trained it" if trained else "did not calibrate it"
    whose = (
        "Of this folder's files, on"
        if contents is Contents.WHOLE
        else "**Of base and adapter together** (see Load), on"
    )
    return [
        "## Quality",
        "\n".join(
            [
                f"{whose} {text.tokens} tokens of {source_name(text.source)} that {apart} "
                f"(sha256 `{text.sha256[:16]}`):",
                "",
                *_table(measured, report.round_to_nearest, "quantized and finetuned" if trained else "quantized"),
            ]
        ),
        *([] if report.served is None else [f"The figures include {report.served}."]),
        *_kinds(measured),
        *_tasks(report),
    ]


def _kinds(measured: Quality) -> list[str]:
    """A table of distances on kinds of text; empty where none was measured."""
    if not measured.kinds:
        return []
    lines = ["| text | KL divergence, nats per token | standard error |", "|---|---|---|"]
    for kind in measured.kinds:
        name = "calibration text" if kind.calibrates else f"held-out {code(kind.name)}"
        error = kind.noise.kl_divergence
        lines.append(f"| {name} | {kind.kl_divergence:.5f} | {'' if error is None else format(error, '.3g')} |")
    return ["\n".join(lines)]


def _tasks(report: Report) -> list[str]:
    """A table of the tasks' figures; empty without a task."""
    if not report.tasks:
        return []
    lines = ["| task | figure | original | this result | standard error | |", "|---|---|---|---|---|---|"]
    for task in report.tasks:
        for one in task.figures:
            original = "" if one.original is None else f"{one.original:.4f}"
            error = "" if one.stderr is None else f"{one.stderr:.3g}"
            noise = "within noise" if one.is_noise else ""
            lines.append(f"| {code(task.name)} | {one.name} | {original} | {one.value:.4f} | {error} | {noise} |")
    return ["\n".join(lines)]


def _table(measured: Quality, reference: Figures | None, name: str) -> Iterator[str]:
    """The original, the result and, where it was measured, round to nearest with the same schemes on the same text."""
    columns = [Figures.of(measured), *([] if reference is None else [reference])]
    yield "| " + " | ".join(["", "original", name, *(["round to nearest"] if reference is not None else [])]) + " |"
    yield "|" + "---|" * (2 + len(columns))
    rows = {
        f"perplexity | {measured.perplexity_original:.4f}": [f"{one.perplexity:.4f}" for one in columns],
        "KL divergence, nats per token | 0": [f"{one.kl_divergence:.5f}" for one in columns],
        "same most likely token | 100 %": [f"{100 * one.top1_agreement:.2f} %" for one in columns],
    }
    for head, figures in rows.items():
        yield " | ".join([f"| {head}", *figures]) + " |"


def training(report: Report) -> list[str]:
    """The section on the training of this job and its base jobs; empty without training."""
    run = report.finetuning
    base_training = () if report.base_job is None else report.base_job.training
    if run is None and not base_training:
        return []
    paragraphs = [_base_training(one) for one in base_training]
    if run is not None:
        about = "An adapter" if report.adapter is None else _adapter(report.adapter)
        paragraphs.append("\n".join([f"{about} was trained beside the quantized weights.", "", *_run(run)]))
        paragraphs += [] if report.adapter is None or report.adapter.merge is None else [_merge(report.adapter)]
    return ["## Training", *paragraphs]


def _base_training(one: BaseTraining) -> str:
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


def _run(run: FinetuningReport) -> Iterator[str]:
    text = run.text
    yield "| | |"
    yield "|---|---|"
    size = f"{text.num_samples} sequences of at most {text.sequence_length} tokens, {text.tokens} tokens"
    yield f"| dataset | {source_name(text.source)} (sha256 `{text.sha256[:16]}`): {size} |"
    yield f"| steps | {_steps(run)} |"
    if run.learning_rate is not None:
        yield f"| learning rate | {run.learning_rate:g} |"
    if run.losses:
        first, last = run.losses[0].loss, run.losses[-1].loss
        yield f"| training loss, nats per token | {first:.4f} at first, {last:.4f} at last |"
    if run.loss_before is not None and run.loss_after is not None:
        held_out = f"loss on {run.held_out_sequences} held-out sequences"
        ships = "" if run.loss_shipped is None else f", {run.loss_shipped:.4f} with the weights that ship"
        yield f"| {held_out} | {run.loss_before:.4f} before, {run.loss_after:.4f} after{ships} |"
    else:
        yield "| held-out loss | not measured: no sequence was held out |"


def _steps(run: FinetuningReport) -> str:
    stopped = f" of {run.steps}, stopped early" if run.stopped_early else ""
    kept = f", the parameters after {run.steps_kept} kept" if run.steps_kept != run.steps_done else ""
    batch = f", {run.batch_size} sequences each" if run.batch_size is not None else ""
    read = f", {run.tokens_read} tokens read" if run.tokens_read is not None else ""
    return f"{run.steps_done}{stopped}{kept}{batch}{read}"


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


def tried(report: Report, export_format: ExportFormat) -> list[str]:
    """A paragraph on the runtimes that read this format where it was made; empty where none did."""
    said = {"loads": "loads", "does_not_load": "does not load", "differs": "misreads"}
    rows = [
        f"| {load.runtime} {load.version or ''} | {'this checkpoint' if load.read == 'files' else 'one block of it'} "
        f"| {said[load.result]} | {'' if load.difference is None else f'{load.difference:.2g}'} |"
        for load in report.loads
        if load.format == export_format.value and load.result in said
    ]
    if not rows:
        return []
    about = "Read back where it was made; the difference of its logits is in standard deviations:"
    return ["\n".join([about, "", "| runtime | read | result | difference |", "|---|---|---|---|", *rows])]
