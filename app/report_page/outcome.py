"""Sections of a report's page on what a job came to: quality, goal, training, merge, runtimes, times, settings."""

from collections.abc import Sequence

from app.domain.methods import METHODS
from app.report_page.charts import Series, bars, plot
from app.report_page.figures import Chart, Figure, Figures, Item, Section, Side, Table, seconds_in_words, token
from bitwright.report import GoalReport, Report, TextReport

READ = {"files": "the whole checkpoint", "block": "one block"}
SAID = {"loads": "loads", "does_not_load": "does not load", "differs": "misreads", "not_checked": "not tried"}


def tiles(report: Report, figures: Figures) -> tuple[tuple[str, Figure, Figure | None], ...]:
    """The figures that come first: name, figure, and the original's beside it."""
    found = [
        ("Bits per weight, whole model", figures.at("/size/bits_per_weight_model", ".3f"), None),
        ("Size", figures.at("/size/bytes_quantized", "bytes"), figures.at("/size/bytes_original", "bytes")),
    ]
    if report.quality is not None:
        original = figures.at("/quality/perplexity_original", ".3f")
        found += [
            ("Perplexity", figures.at("/quality/perplexity", ".3f"), original),
            ("KL to the original, nats a token", figures.at("/quality/kl_divergence", ".5f"), None),
            ("Same most likely token", figures.at("/quality/top1_agreement", "percent"), None),
        ]
    if "total" in report.seconds:
        found.append(("Time", figures.at("/seconds/total", "seconds"), None))
    return tuple(found)


def quality(report: Report, figures: Figures) -> Section | None:
    """The original, the result, each way to load it, and round to nearest as the reference."""
    measured = report.quality
    if measured is None:
        return None
    at = "/quality"
    rows: list[tuple[Item, ...]] = [
        ("original", figures.at(f"{at}/perplexity_original", ".4f"), "0", "100 %"),
        ("this result", *_three(figures, at)),
    ]
    for n, way in enumerate(report.shipped):
        name = " or ".join(way.checkpoints) + ("" if way.adapter is None else f" with {way.adapter}")
        whole = "" if way.whole else ", the base alone"
        rows.append((f"loaded from {name}{whole}", *_three(figures, f"/shipped/{n}/figures")))
    if report.adapter is not None and report.adapter.before_merge is not None:
        rows.append(("with the adapter beside it, before the merge", *_three(figures, "/adapter/before_merge")))
    if report.round_to_nearest is not None:
        rows.append(("round to nearest, same schemes", *_three(figures, "/round_to_nearest")))
    head = ("", "perplexity", "KL, nats a token", "same most likely token")
    said = [f"On {_of(measured.text)}."]
    said += [] if report.served is None else [f"The figures include {report.served}."]
    return Section("quality", "Quality", tuple(said), tables=(Table("Quality", head, tuple(rows), pairs=True),))


def _three(figures: Figures, at: str) -> tuple[Item, ...]:
    return (
        figures.at(f"{at}/perplexity", ".4f"),
        figures.at(f"{at}/kl_divergence", ".5f"),
        figures.at(f"{at}/top1_agreement", "percent"),
    )


def _of(text: TextReport) -> str:
    size = f"{text.num_samples:,} sequences of {text.sequence_length:,} tokens"
    return f"{text.tokens:,} tokens of {text.source} in {size} (sha256 {text.sha256[:16]})"


def tried(report: Report, figures: Figures) -> Section | None:
    """Runtimes that read the result where it was made, and what came of it."""
    rows = tuple(
        (
            one.format,
            f"{one.runtime} {one.version or ''}".strip(),
            READ[one.read],
            SAID[one.result],
            figures.maybe(f"/loads/{n}/difference", ".3g"),
            figures.maybe(f"/loads/{n}/tokens_written"),
            one.detail or "–",
        )
        for n, one in enumerate(report.loads)
    )
    head = ("format", "runtime", "read", "result", "difference", "tokens written", "detail")
    said = ("Read back where it was made; the difference of logits is in standard deviations.",)
    return Section("loads", "Runtimes", said, tables=(Table("Runtimes", head, rows),)) if rows else None


def generations(report: Report, figures: Figures) -> Section | None:
    """Texts of the original and of each checkpoint after the same words."""
    told = [(n, one, one.written) for n, one in enumerate(report.loads) if one.written is not None]
    if not told:
        return None
    rows = tuple(
        (
            one.format,
            one.runtime,
            figures.at(f"/loads/{n}/written/same"),
            figures.at(f"/loads/{n}/written/tokens"),
        )
        for n, one, _ in told
    )
    prompts = dict.fromkeys(text.prompt for _, _, text in told)
    beside = tuple(
        (
            Side("original", prompt + next(text.original for _, _, text in told if text.prompt == prompt)),
            *(
                Side(f"{one.format} in {one.runtime}", prompt + text.result)
                for _, one, text in told
                if text.prompt == prompt
            ),
        )
        for prompt in prompts
    )
    said = ("Each token is the most likely one; the first words are the same for all.",)
    table = Table("Generations", ("format", "runtime", "the same from the first on", "tokens"), rows)
    return Section("generations", "Generations", said, tables=(table,), beside=beside)


def goal(report: Report, figures: Figures) -> Section | None:
    """The frontier of sizes and distances, with the point that was made; and what a budget chose."""
    found, chosen = report.goal, report.allocation
    if found is None and chosen is None:
        return None
    tables = [] if found is None else [_frontier(found, figures)]
    charts = []
    if found is not None:
        known = {
            "predicted": [(p.bytes / 1e6, p.kl_predicted) for p in found.frontier],
            "measured": [(p.bytes / 1e6, p.kl) for p in found.frontier],
        }
        series = [Series(name, [(x, y) for x, y in points if y is not None]) for name, points in known.items()]
        series = [one for one in series if one.points]
        charts = [plot("Size against distance", series, "MB of weight files", "KL")] if series else []
    if chosen is not None:
        rows = (
            ("asked for, bits per weight", figures.maybe("/allocation/average", ".4g")),
            ("reached", figures.at("/allocation/reached", ".4f")),
            ("at most this share above the least error", figures.at("/allocation/gap", "percent")),
            ("time", figures.at("/allocation/seconds", "seconds")),
        )
        tables.append(Table(f"Budget over the {chosen.over}", ("", "value"), rows, pairs=True))
    return Section("goal", "Goal", charts=tuple(charts), tables=tuple(tables))


def _frontier(found: GoalReport, figures: Figures) -> Table:
    rows = tuple(
        (
            "made" if n == found.chosen else "",
            figures.at(f"/goal/frontier/{n}/bytes", "bytes"),
            figures.at(f"/goal/frontier/{n}/bits_per_weight", ".3f"),
            figures.maybe(f"/goal/frontier/{n}/kl_predicted", ".4g"),
            figures.maybe(f"/goal/frontier/{n}/kl", ".4g"),
        )
        for n in range(len(found.frontier))
    )
    head = ("", "weight files", "bits per weight", "KL predicted", "KL measured")
    return Table(f"Frontier; the goal was {'met' if found.met else 'missed'}", head, rows)


def scales(report: Report, figures: Figures) -> Section | None:
    """The stage that tunes all scales together."""
    if report.scales is None:
        return None
    rows: tuple[tuple[Item, ...], ...] = (
        ("steps", figures.at("/scales/steps", ",")),
        ("KL on held-out calibration text before", figures.at("/scales/kl_initial", ".5f")),
        ("after", figures.at("/scales/kl", ".5f")),
        ("kept", "yes" if report.scales.kept else "no"),
        ("norms tuned along", figures.at("/scales/norms", ",")),
        ("codes changed", figures.maybe("/scales/codes", ",")),
        ("time", figures.at("/scales/seconds", "seconds")),
    )
    return _pairs("scales", "Scales tuned end to end", rows)


def training(report: Report, figures: Figures) -> Section | None:
    """Losses of the adapter's training, and what was trained."""
    run = report.finetuning
    if run is None:
        return None
    curves = [Series("training", [(point.step, point.loss) for point in run.losses])]
    curves += [Series("held out", [(one.step, one.loss) for one in run.validations])]
    curves = [one for one in curves if one.points]
    at = "/finetuning"
    rows: list[tuple[Item, ...]] = [
        ("steps asked for", figures.at(f"{at}/steps", ",")),
        ("steps done", figures.at(f"{at}/steps_done", ",")),
        ("parameters kept after", figures.at(f"{at}/steps_kept", ",", " steps")),
        ("learning rate", figures.maybe(f"{at}/learning_rate")),
        ("sequences a step", figures.maybe(f"{at}/batch_size")),
        ("held-out loss before", figures.maybe(f"{at}/loss_before", ".4f")),
        ("held-out loss after", figures.maybe(f"{at}/loss_after", ".4f")),
        ("held-out loss of the weights that ship", figures.maybe(f"{at}/loss_shipped", ".4f")),
        ("rows cut", figures.at(f"{at}/rows_cut", ",")),
        ("rows dropped", figures.at(f"{at}/rows_dropped", ",")),
        ("tokens a second", figures.at(f"{at}/tokens_per_second", ",.0f")),
        ("time", figures.at(f"{at}/seconds", "seconds")),
    ]
    if report.adapter is not None:
        rows = [
            ("adapter", report.adapter.kind),
            ("rank", figures.at("/adapter/rank")),
            ("trained parameters", figures.at("/adapter/parameters", ",")),
            *rows,
        ]
    charts = (plot("Loss, nats per token", curves, "step", "loss"),) if curves else ()
    tables = (Table("Training", ("", "value"), tuple(rows), pairs=True), *_curve(report, figures))
    return Section("training", "Training", (f"On {_of(run.text)}.",), charts, tables)


def _curve(report: Report, figures: Figures) -> tuple[Table, ...]:
    run = report.finetuning
    if run is None or not run.losses:
        return ()
    rows = [
        ("training", figures.at(f"/finetuning/losses/{n}/step", ","), figures.at(f"/finetuning/losses/{n}/loss", ".4f"))
        for n in range(len(run.losses))
    ]
    rows += [
        (
            "held out",
            figures.at(f"/finetuning/validations/{n}/step", ","),
            figures.at(f"/finetuning/validations/{n}/loss", ".4f"),
        )
        for n in range(len(run.validations))
    ]
    return (Table("Loss by step", ("text", "step", "loss"), tuple(rows), folded=True),)


def merge(report: Report, figures: Figures) -> Section | None:
    """The proof that folding the adapter in left codes and scales as they were."""
    proof = None if report.adapter is None else report.adapter.merge
    if proof is None:
        return None
    at = "/adapter/merge"
    rows: tuple[tuple[Item, ...], ...] = (
        ("codes and scales the same, by their hashes", "yes" if proof.codes_and_scales_kept else "no"),
        ("linears", figures.at(f"{at}/linears")),
        ("offsets rounded to integer zero points", "yes" if proof.rounded else "no"),
        ("largest error of the algebra, in fp64", figures.at(f"{at}/error_exact", ".3g")),
        ("with offsets or zero points as stored", figures.at(f"{at}/error_stored", ".3g")),
        ("of the weights in the dtype that ships", figures.at(f"{at}/error_shipped", ".3g")),
    )
    return _pairs("merge", "Proof of the merge", rows)


def times(report: Report, figures: Figures) -> Section:
    """Wall time by stage, and the peak of memory."""
    stages = {name: seconds for name, seconds in report.seconds.items() if name != "total"}
    rows: list[tuple[Item, ...]] = [
        (name, figures.at(f"/seconds/{token(name)}", "seconds"))
        for name in (*stages, "total")
        if name in report.seconds
    ]
    rows += [
        ("peak host memory", figures.at("/peak_memory/host_bytes", "bytes")),
        ("peak device memory", figures.maybe("/peak_memory/device_bytes", "bytes")),
        ("blocks computed", figures.at("/blocks_computed")),
        ("blocks taken over from earlier attempts", figures.at("/blocks_resumed")),
    ]
    chart = bars("Time by stage", [(name, spent, seconds_in_words(spent)) for name, spent in stages.items()])
    return _pairs("time", "Time and memory", rows, *([chart] if stages else []))


def settings(report: Report, figures: Figures) -> Section:
    """Settings and decisions, with versions and hashes, so that another run can do the same."""
    model, method = report.model, METHODS.get(report.method)
    rows: list[tuple[Item, ...]] = [
        ("model", model.source),
        ("revision", model.revision or "–"),
        ("architecture", f"{model.architecture}, {model.dtype}"),
        ("quantized before", model.quantized_source or "no"),
        ("method", report.method if method is None else f"{method.title} ({report.method})"),
        ("scheme", report.scheme or "–"),
        ("seed", figures.at("/seed")),
        ("device", report.device),
        ("Bitwright", report.version),
        ("calibration text", "none" if report.calibration is None else _of(report.calibration)),
    ]
    if report.exported_from is not None:
        rows.append(("exported from", report.exported_from))
    if report.base_job is not None:
        rows.append(("starts from", report.base_job.job_id))
        rows += [("trained earlier", f"{one.adapter} on {_of(one.text)}") for one in report.base_job.training]
    for name, value in report.plan.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        told = figures.at(f"/plan/{token(name)}") if number else "–" if value is None else str(value)
        rows.append((f"plan: {name.replace('_', ' ')}", told))
    for name in report.scales_rounded:
        rows.append((f"scales of {name} rounded by at most", figures.at(f"/scales_rounded/{token(name)}", ".3g")))
    return _pairs("settings", "Settings", rows)


def _pairs(name: str, title: str, rows: Sequence[tuple[Item, ...]], *charts: Chart) -> Section:
    """A section of names and values."""
    return Section(name, title, charts=charts, tables=(Table(title, ("", "value"), tuple(rows), pairs=True),))
