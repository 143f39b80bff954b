"""Progress of the pass through the blocks, as events."""

import time

from bitwright.events import BlockEvent, Stage
from bitwright.report import BlockReport
from workers.engine.reporter import Reporter


def block_event(report: BlockReport, total: int, rounds_before: int = 0) -> BlockEvent:
    """The event of a block that is done, after so many rounds of all blocks."""
    return BlockEvent(
        index=report.index,
        total=total,
        name=report.name,
        loss_initial=report.loss_initial,
        loss=report.loss,
        expert_tokens_least=min((part.tokens_least for part in report.experts), default=None),
        experts_starved=sum(len(part.starved) for part in report.experts) if report.experts else None,
        seconds=report.seconds,
        milestone=rounds_before * total + report.index,
    )


class BlockProgress:
    """Progress of the pass, with the time left from the blocks that were measured."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter = reporter
        self._total = total
        self._started = 0.0
        self._measured: list[float] = []

    def begin(self, index: int) -> None:
        """The block is taken up."""
        self._started = time.monotonic()
        self.tick(index, 0.0)

    def tick(self, index: int, share: float) -> None:
        """So much of the block is done."""
        elapsed = time.monotonic() - self._started
        a_block = sum(self._measured) / len(self._measured) if self._measured else None
        if a_block is None and share > 0.05:
            a_block = elapsed / share
        left = None if a_block is None else max(0.0, (self._total - index - share) * a_block)
        self._reporter.progress(Stage.QUANTIZE, index + min(share, 0.999), self._total, "blocks", left)

    def end(self, index: int, *, computed: bool) -> None:
        """The block is done; only one that was computed says how long others take."""
        if computed:
            self._measured.append(time.monotonic() - self._started)
        if index + 1 == self._total:
            self._reporter.progress(Stage.QUANTIZE, self._total, self._total, "blocks")
