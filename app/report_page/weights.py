"""Sections of a report's page on weights: sizes, errors and widths of linears, losses of blocks."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from app.report_page.charts import Series, bars, figure_text, heatmap, plot, stack, width_map
from app.report_page.figures import Chart, Figures, Item, Section, Table, bytes_in_words, token
from bitwright.report import LinearReport, Report

MOST_ROWS = 1500
"""Linears in the table: of more, those with the largest errors."""
EXPERT = re.compile(r"\.(experts?)\.\d+\.")
PARTS = {"codes": "codes", "scales": "scales and zero points", "codebooks": "codebooks", "adapters": "low-rank factors"}


def sizes(report: Report, figures: Figures) -> Section:
    """Bytes and bits of the whole model, then what the quantized weights are made of."""
    size = report.size
    rows: list[tuple[Item, ...]] = [
        ("tensors of the original", figures.at("/size/bytes_original", "bytes")),
        ("tensors now, as the native format counts", figures.at("/size/bytes_quantized", "bytes")),
        *(
            (f"weight files of {name}", figures.at(f"/size/bytes_files/{token(name)}", "bytes"))
            for name in size.bytes_files
        ),
        ("bits per weight, whole model", figures.at("/size/bits_per_weight_model", ".3f")),
        ("bits per weight, quantized linears", figures.at("/size/bits_per_weight", ".3f")),
        ("quantized weights", figures.at("/size/quantized_weights", ",")),
        ("parameters of the model", figures.at("/model/parameters", ",")),
    ]
    charts: list[Chart] = []
    tables = [Table("Size", ("", "value"), tuple(rows), pairs=True)]
    compared = {"original": size.bytes_original, **(size.bytes_files or {"now": size.bytes_quantized})}
    charts.append(bars("Bytes of weights", [(name, count, bytes_in_words(count)) for name, count in compared.items()]))
    if size.parts is not None:
        parts = {name: bits for name, bits in size.parts.model_dump().items() if bits}
        pieces = [(PARTS[name], bits, f"{bits:.3f}") for name, bits in parts.items()]
        charts.append(stack("Bits of a quantized weight, by what they hold", pieces))
        told = tuple((PARTS[name], figures.at(f"/size/parts/{name}", ".4f")) for name in parts)
        tables.append(Table("Bits of a quantized weight", ("", "bits"), told, pairs=True))
    return Section("size", "Size", charts=tuple(charts), tables=tuple(tables))


@dataclass(frozen=True)
class _Place:
    """A linear with its place in report.json, its block and its role there; both are empty outside the blocks."""

    linear: LinearReport
    pointer: str
    block: str
    role: str


def linears(report: Report, figures: Figures) -> Section | None:
    """Error and bits of each linear: by block and role as shades, and in numbers."""
    places = list(_places(report))
    if not places:
        return None
    by_output = all(place.linear.output_error is not None for place in places if place.block)
    what = "output error" if by_output else "weight error"
    inside = [place for place in places if place.block]
    charts, paragraphs = _maps(inside, what, by_output=by_output) if inside else ([], [])
    shown = places
    if len(places) > MOST_ROWS:
        worst = sorted(range(len(places)), key=lambda index: -_error(places[index].linear, by_output=by_output))
        shown = [places[index] for index in sorted(worst[:MOST_ROWS])]
        paragraphs.append(f"The table has the {MOST_ROWS} linears with the largest {what}, of {len(places)}.")
    head = ("linear", "shape", "bits", "group", "scheme", "rank", "weight error", "output error")
    table = Table(f"Linears: {len(shown)}", head, tuple(_row(place, figures) for place in shown), folded=True)
    return Section("linears", "Error and bits per linear", tuple(paragraphs), tuple(charts), (table,))


def _places(report: Report) -> Iterator[_Place]:
    if report.embeddings is not None:
        yield _Place(report.embeddings, "/embeddings", "", "")
    for b, block in enumerate(report.blocks):
        for n, linear in enumerate(block.linears):
            role = EXPERT.sub(r".\1.*.", linear.name.removeprefix(f"{block.name}."))
            yield _Place(linear, f"/blocks/{b}/linears/{n}", str(block.index), role)
    if report.head is not None:
        yield _Place(report.head, "/head", "", "")


def _maps(places: Sequence[_Place], what: str, *, by_output: bool) -> tuple[list[Chart], list[str]]:
    """Shades of errors and of widths; of several experts the largest error and the mean width."""
    roles, columns = list(dict.fromkeys(p.role for p in places)), list(dict.fromkeys(p.block for p in places))
    alike: dict[tuple[str, str], list[LinearReport]] = {}
    for place in places:
        alike.setdefault((place.role, place.block), []).append(place.linear)
    errors = {key: max(_error(one, by_output=by_output) for one in same) for key, same in alike.items()}
    widths = {key: sum(one.bits for one in same) / len(same) for key, same in alike.items()}
    hints = {key: _hint(same, errors[key], widths[key]) for key, same in alike.items()}
    several = max(map(len, alike.values())) > 1
    paragraphs = [
        f"Relative {what} of each linear, in shades of its logarithm"
        + (": of experts the largest, and the mean of their bits." if several else ".")
    ]
    named = f"{what.capitalize()} by block and linear"
    return [
        heatmap(named, roles, columns, errors, hints),
        width_map("Bits of a code by block and linear", roles, columns, widths),
    ], paragraphs


def _hint(same: Sequence[LinearReport], error: float, bits: float) -> str:
    count = f"{len(same)} like " if len(same) > 1 else ""
    return f"{count}{same[0].name}: error {figure_text(error)}, {bits:g} bits"


def _error(linear: LinearReport, *, by_output: bool) -> float:
    return linear.output_error if by_output and linear.output_error is not None else linear.weight_error


def _row(place: _Place, figures: Figures) -> tuple[Item, ...]:
    linear, at = place.linear, place.pointer
    return (
        linear.name,
        f"{linear.shape[0]} × {linear.shape[1]}",
        figures.at(f"{at}/bits"),
        "row" if linear.group_size == -1 else figures.at(f"{at}/group_size"),
        linear.scheme or linear.form.value,
        figures.maybe(f"{at}/rank"),
        figures.at(f"{at}/weight_error", ".4g"),
        figures.maybe(f"{at}/output_error", ".4g"),
    )


def blocks(report: Report, figures: Figures) -> Section | None:
    """Losses of blocks before and after tuning, their output errors, and starved experts."""
    if not report.blocks:
        return None
    found = {
        "loss at the start": [(b.index, b.loss_initial) for b in report.blocks],
        "loss": [(b.index, b.loss) for b in report.blocks],
    }
    charts: list[Chart] = []
    losses = [Series(name, _known(points)) for name, points in found.items() if _known(points)]
    if losses:
        charts.append(plot("Mean squared error of each block's output", losses, "block", "loss"))
    errors = _known([(b.index, b.output_error) for b in report.blocks])
    if errors:
        series = [Series("output error", errors)]
        charts.append(plot("Relative error of each block's output", series, "block", "output error"))
    head = ("block", "name", "loss at the start", "loss", "output error", "time")
    rows = tuple(
        (
            figures.at(f"/blocks/{b}/index"),
            block.name,
            figures.maybe(f"/blocks/{b}/loss_initial", ".4g"),
            figures.maybe(f"/blocks/{b}/loss", ".4g"),
            figures.maybe(f"/blocks/{b}/output_error", ".4g"),
            figures.at(f"/blocks/{b}/seconds", "seconds"),
        )
        for b, block in enumerate(report.blocks)
    )
    tables = [Table(f"Blocks: {len(rows)}", head, rows, folded=True), *_experts(report, figures)]
    return Section("blocks", "Loss per block", charts=tuple(charts), tables=tuple(tables))


def _known(points: Sequence[tuple[int, float | None]]) -> list[tuple[float, float]]:
    return [(float(x), y) for x, y in points if y is not None]


def _experts(report: Report, figures: Figures) -> list[Table]:
    """Calibration tokens of experts, where there are any."""
    rows = tuple(
        (
            one.name,
            figures.at(f"/blocks/{b}/experts/{n}/experts"),
            figures.at(f"/blocks/{b}/experts/{n}/tokens_least", ","),
            figures.at(f"/blocks/{b}/experts/{n}/tokens_median", ",g"),
            str(len(one.starved)),
            one.fallback or "–",
        )
        for b, block in enumerate(report.blocks)
        for n, one in enumerate(block.experts)
    )
    head = ("experts of", "how many", "fewest tokens", "median", "starved", "done for them")
    return [Table("Calibration tokens of experts", head, rows, folded=True)] if rows else []
