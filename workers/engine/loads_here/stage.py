"""The checks of a job, as its order wants them: nothing, one block, or one block and the files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.domain.formats import ExportFormat
from app.domain.runtimes import Runtime
from app.domain.weight_targets import text_config
from bitwright.events import Stage
from bitwright.report import LoadReport
from workers.disk.orders import AttemptOrder
from workers.engine.export import OUTPUT
from workers.engine.exports.stage import Finished
from workers.engine.job import Job
from workers.engine.loads_here import block
from workers.engine.loads_here.checks import Check, Probe, checks_of, untried
from workers.engine.loads_here.files import TOKENS, ShippedLogits, Way, read_files, too_large
from workers.engine.loads_here.reading import Reading
from workers.engine.loads_here.side_by_side import side_by_side
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.quantize.stage import Quantized
from workers.engine.reporter import Reporter
from workers.engine.shipped import TrainedAdapters
from workers.formats.registry import base_format

NO_MODEL = "no model is built of it, so none of one block"
NO_BASE = "its base is not among the formats that were made: ask for merged, too"


class Verification:
    """The checks of one attempt.

    checks     none where the request wants none, or where the worker has no runtime that reads one of its formats
    of_block   reports on the one block, once they are there
    """

    def __init__(self, order: AttemptOrder, reading: Reading, checks: list[Check]) -> None:
        self._order, self._reading, self.checks = order, reading, checks
        self._untried = () if order.request.verify == "off" else untried(order)
        self.of_block = self._untried
        self._running: block.BlockCheck | None = None

    def begin(self, job: Job) -> None:
        """Start to check one block, beside what the job does next."""
        if self.checks:
            with job.clock.during(Stage.VERIFY):
                self._running = block.begin(job, self.checks, self._reading)

    def checked(self, quantize: Callable[[Job, Callable[[], object]], Quantized]) -> Callable[[Job], Quantized]:
        """The stage that quantizes, while one block in the job's schemes is read back.

        Blocks are tuned meanwhile, and none after a failure is known. Where nothing is tuned no hours are at stake: the
        block is read beside everything that comes before the checkpoints.
        """

        def run(job: Job) -> Quantized:
            self.begin(job)
            if job.model.device.type == "cuda" and any(check.runtime is Runtime.VLLM for check in self.checks):
                self.demand_block()  # else both would count on the GPU's free memory
            quantized = quantize(job, self.look_at_block)
            if job.spec.observes_inputs():
                self.demand_block()
            return quantized

        return run

    def look_at_block(self) -> None:
        """`demand_block`, where that does not wait."""
        if self._running is not None and self._running.is_known:
            self.demand_block()

    def demand_block(self) -> None:
        """Wait for the block's reports.

        Raises:
            RuntimeDidNotLoad: a runtime does not load it.
        """
        if self._running is not None:
            self.of_block = (*self._running.result(), *self._untried)
            self._running = None

    def files(self, job: Job, trained: TrainedAdapters | None) -> tuple[LoadReport, ...]:
        """The block's reports, and those on the finished checkpoints if the request wants them read."""
        if self._order.request.verify != "files" or not self.checks:
            return self.of_block
        job.clock.enter(Stage.VERIFY)
        probe = Probe.of(job.model.checkpoint.folder, job.model.known_tokens)
        logits = ShippedLogits(job, trained, probe)
        parameters = sum(weight.numel() for weight in job.model.model.parameters())
        output = job.workspace / OUTPUT
        words = None
        if not too_large(parameters):
            words = side_by_side(self._reading, job.model.checkpoint.folder, probe, TOKENS)
        read = read_files(self.checks, self._reading, job.reporter, output, probe, logits.way, parameters, words)
        return (*self.of_block, *read)

    def weights(self, checkpoint: Checkpoint, reporter: Reporter, output: Path) -> tuple[LoadReport, ...]:
        """The reports on a job without a model: of its finished checkpoints alone, whose logits nobody knows."""
        if self._order.request.verify != "files":
            return (*(block.skipped(check, NO_MODEL) for check in self.checks), *self._untried)
        parameters = sum(tensor.size // 2 for tensor in checkpoint.tensors.values())
        made = Finished(output, checkpoint.folder, checkpoint.config, parameters)
        return (*self._alone(made, reporter, self.checks), *self._untried)

    def exported(self, made: Finished, reporter: Reporter) -> tuple[LoadReport, ...]:
        """The reports on an export's finished checkpoints, if the request wants them read."""
        formats = self._order.request.formats
        if self._order.request.verify != "files":
            return ()
        able = [each for each in self.checks if not each.format.info.is_adapter or base_format(formats) in formats]
        unable = (block.skipped(check, NO_BASE) for check in self.checks if check not in able)
        untried = [report.model_copy(update={"read": "files"}) for report in (*unable, *self._untried)]
        return (*self._alone(made, reporter, able), *untried)

    def _alone(self, made: Finished, reporter: Reporter, checks: list[Check]) -> tuple[LoadReport, ...]:
        """Finished checkpoints, read without a model to hold their logits against."""
        vocabulary, formats = text_config(made.config).get("vocab_size"), self._order.request.formats
        probe = Probe.of(made.source, vocabulary if isinstance(vocabulary, int) else 1)

        def way(name: ExportFormat) -> Way:
            return Way(base_format(formats) if name.info.is_adapter else None)

        return read_files(checks, self._reading, reporter, made.output, probe, way, made.parameters)


@contextmanager
def verification(order: AttemptOrder, workspace: Path) -> Iterator[Verification]:
    """The checks of an order, and a child that gets ready for them while the job is opened.

    Raises:
        RuntimeDidNotLoad: the worker lacks a runtime that the request requires.
    """
    checks = [] if order.request.verify == "off" else checks_of(order)
    reading = Reading(order, workspace / block.FOLDER)
    try:
        if checks:
            reading.warm_up()
        yield Verification(order, reading, checks)
    finally:
        reading.close()
