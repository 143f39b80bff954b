"""Output for people: tables, errors, sizes and times. Programs use --json."""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.errors import BitwrightError
from bitwright.events import ProgressEvent
from bitwright.frontier import FrontierPoint
from bitwright.job_states import JobStatus
from bitwright.measured.tasks import TaskFigure
from bitwright.report import LoadReport, Report
from bitwright.request import AdapterRequestView, GoalView, QuantizationView
from bitwright.views import JobView, MethodList, QueueView

STATUS_STYLES = {
    JobStatus.QUEUED: "yellow",
    JobStatus.RUNNING: "cyan",
    JobStatus.SUCCEEDED: "green",
    JobStatus.FAILED: "red",
    JobStatus.CANCELLED: "magenta",
}


def out() -> Console:
    """Standard output; created on each call, because tests and pipes replace it."""
    return Console(highlight=False)


def err() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def print_error(error: BitwrightError) -> None:
    """Print code, cause, every field at fault and the way out, none of them twice."""
    lines = error_lines(error)
    console = err()
    console.print(Text.assemble((f"{error.code}: ", "bold red"), lines[0]), soft_wrap=True)
    for line in lines[1:]:
        console.print(Text(f"  {line}"), soft_wrap=True)


def error_lines(error: BitwrightError) -> list[str]:
    """The lines that describe an error. The detail repeats the first problem, so problems replace it."""
    problems = [
        f"{problem.field}: {problem.detail}{f' (got {problem.value!r})' if problem.value is not None else ''}"
        for problem in error.errors
    ]
    repeats = bool(error.errors) and error.errors[0].detail in error.detail
    if len(problems) > 1 and repeats:
        lines = [f"{len(problems)} things are wrong", *problems]
    else:
        lines = problems if repeats else [error.detail, *problems]
    hint = error.hint
    return [*lines, *([hint] if hint and not any(hint in line for line in lines) else [])]


def format_bytes(count: float) -> str:
    """3 significant digits in decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_amount(progress: ProgressEvent) -> str:
    """ "3/30 blocks", "1.2 MB of 4 MB"."""
    if progress.unit == "bytes":
        return f"{format_bytes(progress.done)} of {format_bytes(progress.total)}"
    return f"{progress.done:.4g}/{progress.total:.4g} {progress.unit}"


def format_seconds(seconds: float) -> str:
    """ "4.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_age(moment: datetime) -> str:
    """Time since `moment`, coarsely."""
    return format_seconds(max(0.0, (datetime.now(UTC) - moment).total_seconds())) + " ago"


def status_text(status: JobStatus) -> Text:
    return Text(status.value, style=STATUS_STYLES[status])


def progress_text(job: JobView) -> str:
    """Stage and share done of a running job, place of a queued one or `held`; the error's code of a failed one."""
    if job.error is not None:
        return job.error.code
    if job.queue is not None:
        return queue_text(job.queue)
    if job.held and job.status is JobStatus.QUEUED:
        return "held"
    if job.progress is None or job.status is not JobStatus.RUNNING:
        return ""
    p = job.progress
    eta = f", {format_seconds(p.eta_seconds)} left" if p.eta_seconds is not None else ""
    return f"{p.stage.value} {format_amount(p)}{eta}"


def queue_text(place: QueueView) -> str:
    """Place of a queued job, and the time when it may begin."""
    eta = place.eta_seconds
    begins = "" if eta is None else ", begins now" if eta < 1 else f", begins in about {format_seconds(eta)}"
    return f"number {place.position} in the queue{begins}"


def jobs_table(jobs: Iterable[JobView]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "model", "method", "created", "progress"):
        table.add_column(column, overflow="fold", no_wrap=column == "job")
    for job in jobs:
        table.add_row(
            job.id, status_text(job.status), job.model, asked_for(job), format_age(job.created_at), progress_text(job)
        )
    return table


def asked_for(job: JobView) -> str:
    """The recipe that was requested, or the method."""
    return job.recipe or job.method


def job_line(job: JobView) -> str:
    """A job as one line for programs: id, status, recipe or method, model, time of creation, progress."""
    created = job.created_at.isoformat(timespec="seconds")
    return tabbed(job.id, job.status.value, asked_for(job), job.model, created, progress_text(job))


def tabbed(*fields: object) -> str:
    """Fields as one line, divided by tabs; characters that would break the line become spaces."""
    return "\t".join(" ".join(re.split(r"[\t\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", str(field))) for field in fields)


def scheme_text(quantization: QuantizationView) -> str:
    """Width of the codes or the budget that linears share, group and form."""
    if quantization.scheme is not None:
        return quantization.scheme
    budget, goal = quantization.budget(), quantization.at_most or quantization.fits
    if goal is not None:
        bits = goal_text(goal)
    elif budget is None:
        bits = f"{quantization.bits} bits"
    else:
        whole = " of the whole model" if budget.over == "model" else ""
        bits = f"{budget.average:g} bits per weight{whole} of {', '.join(map(str, budget.choices or ()))}"
    form = "symmetric" if quantization.symmetric else "asymmetric"
    return f"{bits}, group {quantization.group_size}, {form}"


def goal_text(goal: GoalView) -> str:
    """A goal, and what is chosen from."""
    if goal.memory is not None:
        asked = f"fits {format_bytes(goal.memory)} with {goal.sequences} x {goal.context} tokens"
    else:
        asked = "at most " + (f"KL {goal.kl:g}" if goal.kl is not None else format_bytes(goal.bytes or 0))
    return f"{asked}, of {', '.join(map(str, goal.choices or ()))}"


def job_table(job: JobView) -> Table:
    """One job, its attempts and, once there, its report."""
    table = pairs()
    table.add_row("job", job.id)
    table.add_row("status", status_text(job.status))
    table.add_row("model", job.model)
    table.add_row("method", f"{job.recipe} ({job.method})" if job.recipe else job.method)
    if job.request.quantization is not None:
        table.add_row("scheme", scheme_text(job.request.quantization))
        table.add_row("formats", ", ".join(job.request.formats or ()))
        if job.request.adapter is not None:
            table.add_row("adapter", adapter_text(job.request.adapter, job.request.merge))
        if job.request.base_job is not None:
            table.add_row("starts from", job.request.base_job)
    else:
        table.add_row("request", Text("of another version; --json shows it as it was stored", style="dim"))
    table.add_row("created", job.created_at.isoformat(timespec="seconds"))
    if progress := progress_text(job):
        table.add_row("progress", progress)
    for attempt in job.attempts:
        text = f"{attempt.status}, {attempt.blocks_done} blocks" + (f", {attempt.error.code}" if attempt.error else "")
        table.add_row(f"attempt {attempt.number}", text)
    if job.error is not None:
        table.add_row("error", Text(f"{job.error.code}: {job.error.detail}", style="red"))
        for point in job.error.frontier or ():
            table.add_row("within reach", point_text(point))
    for name, value in job.metadata.items():
        table.add_row(f"metadata {name}", value)
    return table


def point_text(point: FrontierPoint) -> str:
    """A point of a frontier: size, and distance as far as it is known."""
    known = point.kl if point.kl is not None else point.kl_rounded
    distance = "" if known is None else f", KL {known:.3g}"
    if known is None and point.kl_predicted is not None:
        distance = f", KL about {point.kl_predicted:.3g}"
    return f"{format_bytes(point.bytes)}, {point.bits_per_weight:.2f} bits per weight{distance}"


def adapter_text(adapter: AdapterRequestView, merge: str | None) -> str:
    """Kind and rank of an adapter, and where it ends up."""
    return f"{adapter.kind} of rank {adapter.rank}, " + ("stays apart" if merge is None else f"merged ({merge})")


def report_table(report: Report, files: Mapping[str, int] = MappingProxyType({})) -> Table:
    """Size and quality: before and after.

    files   bytes on disk by format, of the folders that `download` brings; empty: bytes of the native tensors
    """
    table = Table(box=None, pad_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    size, quality = report.size, report.quality
    before = format_bytes(size.bytes_original)
    for name, bytes_ in (files or {"": size.bytes_quantized}).items():
        table.add_row(f"size of {name}" if name else "size", before, format_bytes(bytes_))
        before = ""
    original_bits = 8 * size.bytes_original / max(1, report.model.parameters)
    table.add_row("bits per weight, whole model", f"{original_bits:.2f}", f"{size.bits_per_weight_model:.3f}")
    table.add_row("bits per weight, quantized linears", f"{original_bits:.2f}", f"{size.bits_per_weight:.3f}")
    if size.parts is not None and size.parts.adapters:
        table.add_row("of these, low-rank factors", "", f"{size.parts.adapters:.3f}")
    if quality is not None:
        table.add_row("perplexity", f"{quality.perplexity_original:.3f}", f"{quality.perplexity:.3f}")
        table.add_row("KL to the original, nats per token", "0", f"{quality.kl_divergence:.5f}")
        table.add_row("same most likely token", "100 %", f"{100 * quality.top1_agreement:.1f} %")
        for kind in quality.kinds:
            name = "calibration text" if kind.calibrates else f"held-out {kind.name}"
            table.add_row(f"KL on {name}", "0", f"{kind.kl_divergence:.5f}")
    for task in report.tasks:
        for figure in task.figures:
            before = "" if figure.original is None else f"{figure.original:.4f}"
            table.add_row(f"{task.name}: {figure.name}", before, figure_text(figure))
    if (nearest := report.round_to_nearest) is not None:
        figures = f"perplexity {nearest.perplexity:.3f}, KL {nearest.kl_divergence:.5f}"
        table.add_row("round to nearest, same scheme", "", figures)
    if (goal := report.goal) is not None:
        asked = f"KL {goal.limit:g}" if goal.goal == "kl" else format_bytes(goal.limit)
        table.add_row(f"goal {'met' if goal.met else 'missed'}: {asked}", "", point_text(goal.frontier[goal.chosen]))
    if report.scales is not None and report.scales.kept:
        before, after = f"{report.scales.kl_initial:.5f}", f"{report.scales.kl:.5f}"
        table.add_row("KL on held-out calibration text, scales tuned", before, after)
    for name, said in loads_text(report.loads).items():
        table.add_row(name, "", said)
    return table


def figure_text(figure: TaskFigure) -> str:
    """A task's figure with its standard error, and whether it may be the original's."""
    error = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
    return f"{figure.value:.4f}{error}{', within noise' if figure.is_noise else ''}"


def loads_text(loads: Iterable[LoadReport]) -> dict[str, str]:
    """Format and runtime -> its last word on the result: on the files, else on one block."""
    said = {"loads": "loads", "does_not_load": "does not load", "differs": "misreads", "not_checked": "not tried with"}
    read = {"files": "the files", "block": "one block"}
    return {
        f"{load.format} in {load.runtime} {load.version or ''}".strip(): f"{said[load.result]} {read[load.read]}"
        for load in sorted(loads, key=lambda load: load.read == "files")
    }


def times_table(report: Report) -> Table:
    """Wall time by stage, and the peak of memory."""
    table = pairs()
    for stage, seconds in report.seconds.items():
        table.add_row(stage, format_seconds(seconds))
    table.add_row("peak host memory", format_bytes(report.peak_memory.host_bytes))
    if report.peak_memory.device_bytes is not None:
        table.add_row("peak device memory", format_bytes(report.peak_memory.device_bytes))
    return table


def methods_table(methods: MethodList) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("method", "what it does", "paper", "presets"):
        table.add_column(column, overflow="fold")
    for row in _method_rows(methods):
        table.add_row(*row)
    return table


def method_lines(methods: MethodList) -> Iterator[str]:
    """Methods and recipes as lines for programs: name, what it does, paper, presets."""
    return (tabbed(*row) for row in _method_rows(methods))


def _method_rows(methods: MethodList) -> Iterator[tuple[str, str, str, str]]:
    for method in methods.items:
        paper = f"arXiv:{method.paper}" if method.paper else ""
        yield method.name, method.summary, paper, ", ".join(method.presets)
    for recipe in methods.recipes:
        stands_for = ", ".join(f"{name}={value}" for name, value in recipe.expands_to.items())
        yield recipe.name, f"short for {stands_for}", "", ""


def pairs() -> Table:
    """An empty table of names and values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table
