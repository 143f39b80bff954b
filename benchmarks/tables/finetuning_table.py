"""The tables that docs/results.md shows of the finetuned cells; a cell that was not measured is shown as missing."""

from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import fmean

from benchmarks.tables.cells import Cell
from benchmarks.tables.finetuning_cells import finetuning_cells
from benchmarks.tables.results_table import MISSING, Line, by_row, lines, spread, table

Show = Callable[[Sequence[Line]], str]


def finetuning_tables(measured: Sequence[Line], wanted: Iterable[Cell]) -> str:
    """Losses before and after the merge by row and width, what training cost, and what gates saved."""
    wanted = list(wanted)
    rows, widths = by_row(measured, wanted)
    header = ["adapter, budget", *(f"{bits:g} bits" for bits in widths)]
    gated = {cell.arm for cell in wanted if cell.training and cell.training["adapter"]["kind"] == "bayesian-lora"}

    def shown(show: Show, only: Collection[str] = tuple(rows)) -> str:
        cells = [[row, *(_cell(of.get(bits), show) for bits in widths)] for row, of in rows.items() if row in only]
        return table(header, cells)

    return "\n\n".join(
        [
            "Loss on held-out text, nats per token: with the trained adapter, and of the merged checkpoint; the mean "
            "of the seeds where there are several, with their spread:",
            shown(_held_out),
            "Loss of training, the last tenth of the steps:",
            shown(lambda cells: _mean(cells, "loss")),
            "Trained parameters, seconds of training, tokens per second, peak memory:",
            shown(_cost),
            "Share of the adapter's bit operations that gates saved, against the same ranks at 16 bits:",
            shown(_saved, gated),
        ]
    )


def _cell(given: list[Line | None] | None, show: Show) -> str:
    if given is None:
        return ""
    known = [line for line in given if line is not None]
    if not known:
        return MISSING
    partly = f" ({len(known)} of {len(given)} seeds)" if len(known) < len(given) else ""
    return show(known) + partly


def _held_out(measured: Sequence[Line]) -> str:
    return f"{_mean(measured, 'held_out')}, merged {_mean(measured, 'merged')}"


def _mean(measured: Sequence[Line], name: str) -> str:
    values = [line[name] for line in measured]
    return f"{fmean(values):.4f}{spread(values)}"


def _saved(measured: Sequence[Line]) -> str:
    values = [100 * line["bit_operations_saved"] for line in measured]
    return f"{fmean(values):.1f} %{spread(values)}"


def _cost(measured: Sequence[Line]) -> str:
    seconds, speed = (fmean(line[name] for line in measured) for name in ("seconds", "tokens_per_second"))
    memory = max(line["peak_gib"] for line in measured)
    return f"{measured[0]['parameters']:,}, {seconds:.0f} s, {speed:,.0f}, {memory:.1f} GiB"


def finetuning_results() -> str:
    """All tables of the file."""
    return finetuning_tables(lines(), finetuning_cells())
