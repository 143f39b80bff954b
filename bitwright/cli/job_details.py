"""Tables about one job beside its status: the training, the files to download, the answer to a dry run."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from bitwright.cli.render import adapter_text, format_bytes, format_seconds, pairs, scheme_text
from bitwright.files.delivery import delivery
from bitwright.report import Report
from bitwright.views import ArtifactView, FigureView, JobView, PreflightView


def training_table(report: Report) -> Table | None:
    """The adapter, steps and time of the training, and the losses before and after; None without training."""
    adapter, trained = report.adapter, report.finetuning
    if adapter is None and trained is None:
        return None
    table = pairs()
    if adapter is not None:
        least, most = adapter.inner_ranks
        inner = f"{least}" if least == most else f"{least} to {most}"
        table.add_row("adapter", f"{adapter.kind}, rank {adapter.rank} (inner rank {inner})")
        table.add_row("trained parameters", f"{adapter.parameters:,}")
    if trained is not None:
        kept = "" if trained.steps_kept == trained.steps_done else f", the parameters after {trained.steps_kept} kept"
        early = ", stopped early" if trained.stopped_early else ""
        table.add_row("steps", f"{trained.steps_done} of {trained.steps}{kept}{early}")
        if trained.losses:
            first, last = trained.losses[0], trained.losses[-1]
            table.add_row("training loss", f"{first.loss:.4f} to {last.loss:.4f} nats per token")
        if trained.loss_before is not None and trained.loss_after is not None:
            ships = "" if trained.loss_shipped is None else f", {trained.loss_shipped:.4f} with the weights that ship"
            losses = f"{trained.loss_before:.4f} to {trained.loss_after:.4f} nats per token{ships}"
            table.add_row("held-out loss", losses)
        table.add_row("trained on", f"{trained.text.source}, {trained.text.tokens:,} tokens")
    return table


def brought(job: JobView, artifacts: Sequence[ArtifactView]) -> dict[str, int]:
    """Bytes on disk of the folders that `download` brings, by format."""
    if not artifacts:
        return {}
    together = delivery(list(dict.fromkeys(artifact.format for artifact in artifacts)), job.request)
    return {name: sum(artifact.size for artifact in artifacts if artifact.format == name) for name in together}


def sizes_text(artifacts: Iterable[ArtifactView]) -> dict[str, str]:
    """Bytes on disk of the folders that the job keeps, by format: all files, and the largest by its name."""
    by_format: dict[str, list[ArtifactView]] = {}
    for artifact in artifacts:
        by_format.setdefault(artifact.format, []).append(artifact)
    texts = {}
    for name, files in by_format.items():
        largest = max(files, key=lambda artifact: artifact.size)
        total = format_bytes(sum(artifact.size for artifact in files))
        texts[name] = f"{total} in {len(files)} files, {largest.path} {format_bytes(largest.size)}"
    return texts


def files_table(job: JobView, artifacts: Sequence[ArtifactView]) -> Table:
    """The folders of the job and their sizes: first those that `download` brings, then the rest."""
    table = pairs()
    sizes, together = sizes_text(artifacts), list(brought(job, artifacts))
    for name in (*together, *sorted(sizes.keys() - set(together))):
        table.add_row(name, sizes[name] + ("" if name in together else "  (with --format)"))
    return table


def preflight_table(view: PreflightView) -> Table:
    """The answer to a dry run: the request's main fields, estimates, warnings."""
    table, request = pairs(), view.request
    if request.model is not None:
        table.add_row("model", request.model.shorthand())
    if request.quantization is not None:
        table.add_row("method", request.quantization.method)
        table.add_row("scheme", scheme_text(request.quantization))
    if request.adapter is not None:
        table.add_row("adapter", adapter_text(request.adapter, request.merge))
    table.add_row("formats", ", ".join(request.formats or ()) or "native")
    for name, value in view.estimates.items():
        if value is not None:
            table.add_row(f"estimate: {name.removesuffix('_bytes').replace('_', ' ')}", _estimate_text(name, value))
    if view.not_checked is not None:
        table.add_row("not checked", Text(f"the model on the {view.not_checked}", style="yellow"))
    for warning in view.warnings:
        table.add_row("warning", Text(warning, style="yellow"))
    for other in view.alternatives:
        changes = ", ".join(f"{name}={value}" for name, value in other.changes.items())
        table.add_row(other.why, f"{changes}: {figures_text(other.figures)}")
    return table


def figures_text(figures: Iterable[FigureView]) -> str:
    """ "62 MB, 40.0 s on cpu, KL 0.031 (measured)"."""
    said = []
    for figure in figures:
        where = f" on {figure.device}" if figure.device and figure.name == "seconds" else ""
        amount = f"KL {figure.value:.3g}" if figure.name == "kl" else _estimate_text(figure.name, figure.value)
        said.append(f"{amount}{where}")
    return f"{', '.join(said)} ({', '.join(dict.fromkeys(figure.basis for figure in figures))})"


def _estimate_text(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_estimate_text(name, amount)} on {key}" for key, amount in value.items())
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in name:
            return format_bytes(value)
        if "seconds" in name:
            return format_seconds(value)
        return f"{value:,}"
    return str(value)
