"""Sections of a report's page on how sure its quality is: noise, kinds of text, tasks."""

from app.report_page.charts import bars
from app.report_page.figures import Figures, Item, Section, Table
from bitwright.measured.kinds import KindQuality
from bitwright.measured.noise import within_noise
from bitwright.measured.tasks import TaskFigure
from bitwright.report import Report


def noise(report: Report, figures: Figures) -> Section | None:
    """Standard errors of the quality, and the figures of each draw of the text."""
    found = None if report.quality is None else report.quality.noise
    if found is None or report.quality is None:
        return None
    at = "/quality/noise"
    rows: list[tuple[Item, ...]] = [
        ("perplexity", figures.at("/quality/perplexity", ".4f"), figures.maybe(f"{at}/perplexity", ".3g")),
        ("KL, nats a token", figures.at("/quality/kl_divergence", ".5f"), figures.maybe(f"{at}/kl_divergence", ".3g")),
        (
            "same most likely token",
            figures.at("/quality/top1_agreement", "percent"),
            figures.maybe(f"{at}/top1_agreement", "percent"),
        ),
    ]
    rows += [
        (f"KL of draw {n + 1}", figures.at(f"/quality/draws/{n}", ".5f"), "–") for n in range(len(report.quality.draws))
    ]
    said = [
        f"Over {found.sequences} sequences: two results whose figures differ by less than two standard errors "
        "may be alike."
    ]
    said += [] if _nearest_is_alike(report) is None else [str(_nearest_is_alike(report))]
    table = Table("Noise", ("", "figure", "standard error"), tuple(rows), pairs=True)
    return Section("noise", "Noise", tuple(said), tables=(table,))


def _nearest_is_alike(report: Report) -> str | None:
    """Words on a result that differs from round to nearest by no more than the noise."""
    nearest, measured = report.round_to_nearest, report.quality
    if nearest is None or measured is None or measured.noise is None:
        return None
    difference = nearest.kl_divergence - measured.kl_divergence
    if not within_noise(difference, measured.noise.kl_divergence):
        return None
    return "The difference in KL between this result and round to nearest is within noise."


def kinds(report: Report, figures: Figures) -> Section | None:
    """Distance on text that calibrated, and on held-out rows of each part of the calibration's mixture."""
    found = () if report.quality is None else report.quality.kinds
    if not found or report.quality is None:
        return None
    rows: list[tuple[Item, ...]] = [
        (
            "evaluation text",
            "–",
            "no",
            figures.at("/quality/kl_divergence", ".5f"),
            figures.maybe("/quality/noise/kl_divergence", ".3g"),
            figures.at("/quality/top1_agreement", "percent"),
            figures.at("/quality/text/tokens", ","),
        )
    ]
    for n, kind in enumerate(found):
        at = f"/quality/kinds/{n}"
        rows.append(
            (
                "calibration text" if kind.calibrates else kind.name,
                figures.maybe(f"{at}/share", "percent"),
                "yes" if kind.calibrates else "no",
                figures.at(f"{at}/kl_divergence", ".5f"),
                figures.maybe(f"{at}/noise/kl_divergence", ".3g"),
                figures.at(f"{at}/top1_agreement", "percent"),
                figures.at(f"{at}/tokens", ","),
            )
        )
    head = ("text", "share", "calibrated", "KL, nats a token", "standard error", "same most likely token", "tokens")
    chart = bars(
        "KL by kind of text", [(_kind_name(kind), kind.kl_divergence, f"{kind.kl_divergence:.4g}") for kind in found]
    )
    said = ("Rows that are held out are of the same kind as those that calibrated, and none of them did.",)
    return Section("kinds", "Kinds of text", said, (chart,), (Table("Kinds of text", head, tuple(rows)),))


def _kind_name(kind: KindQuality) -> str:
    return "calibration text" if kind.calibrates else kind.name


def tasks(report: Report, figures: Figures) -> Section | None:
    """Figures of each task, of the original and of the result, with the noise of their difference."""
    tables = []
    for n, task in enumerate(report.tasks):
        rows = tuple(
            (
                one.name.replace("_", " "),
                figures.maybe(f"/tasks/{n}/figures/{m}/original", ".4f"),
                figures.at(f"/tasks/{n}/figures/{m}/value", ".4f"),
                figures.maybe(f"/tasks/{n}/figures/{m}/stderr", ".3g"),
                figures.maybe(f"/tasks/{n}/figures/{m}/difference_stderr", ".3g"),
                _verdict(one),
                figures.at(f"/tasks/{n}/figures/{m}/rows", ","),
            )
            for m, one in enumerate(task.figures)
        )
        head = ("", "original", "this result", "standard error", "of the difference", "result", "rows")
        caption = f"{task.name}: {task.kind.replace('_', ' ')} on {task.source} (sha256 {task.sha256[:16]})"
        tables.append(Table(caption, head, rows))
    said = (
        "Both models were asked the same rows. A difference of at most two of its standard errors is within noise.",
    )
    return Section("tasks", "Tasks", said, tables=tuple(tables)) if tables else None


def _verdict(figure: TaskFigure) -> str:
    worse = figure.worse_by
    if worse is None:
        return "–"
    if figure.is_noise:
        return "within noise"
    return "worse" if worse > 0 else "better" if worse < 0 else "the same"
