"""Tasks of an evaluation, asked of the original model whole, and then of the first thing that ships.

The whole model is on the device meanwhile, as transformers computes it, without fused parts: its numbers are those that
the checkpoint gives in transformers. Inputs are rounded as a server of the result rounds them; a rounded cache of keys
and values is not.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from bitwright.events import Stage
from bitwright.measured.tasks import TaskReport
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.serving import Served
from workers.engine.shipped import Replay, Shipment, TrainedAdapters
from workers.engine.tasks.asking import Asked
from workers.engine.tasks.scoring import Scored, figures, scored
from workers.engine.text.sequences import load_tokenizer


def run(
    job: Job, shipment: Shipment, trained: TrainedAdapters | None, served: Mapping[int, Served]
) -> tuple[TaskReport, ...]:
    """The report of each task; empty where there is none, and of all ranks but the first.

    Raises:
        NumericalFailure: a model's output is not finite.
    """
    asked, tasks = job.texts.tasks, () if job.request.evaluation is None else job.request.evaluation.tasks
    if not asked or not job.processes.leads:
        return ()
    model = StreamedModel.open(job.model.checkpoint, job.model.device, fused=False)
    person = Asked(model.model, load_tokenizer(model.checkpoint.folder), model.device, model.positions)
    total, done, reports = 2 * sum(len(each.rows) for each in asked), 0, []
    seconds = [0.0] * len(tasks)

    def tick() -> None:
        nonlocal done
        done += 1
        job.reporter.progress(Stage.EVALUATE, done, total, "rows")

    def ask_all() -> list[list[Scored]]:
        found = []
        for number, (task, rows) in enumerate(zip(tasks, asked, strict=True)):
            began = time.monotonic()
            found.append(scored(person, task, rows, tick))
            seconds[number] += time.monotonic() - began
        return found

    with model.loaded(*_parts(model)):
        original = ask_all()
    with _shipped(model, Replay(model, job.finished_blocks, trained), shipment, served):
        result = ask_all()
    for number, (task, rows) in enumerate(zip(tasks, asked, strict=True)):
        told = TaskReport(
            name=task.name,
            kind=task.kind.value,
            source=rows.source,
            sha256=hashlib.sha256(rows.model_dump_json(include={"rows"}).encode()).hexdigest(),
            rows=len(rows.rows),
            figures=tuple(figures(task, rows, original[number], result[number])),
            tokens_written=sum(len(each.written) for each in result[number]),
            seconds=seconds[number],
        )
        for figure in told.figures:
            job.reporter.metric(f"tasks.{task.name}.{figure.name}", figure.value)
        reports.append(told)
    return tuple(reports)


def _parts(model: StreamedModel) -> list[str]:
    """Modules that write text: the decoder's, its blocks, the head."""
    blocks = [model.layout.block(index) for index in range(len(model.blocks))]
    return list(dict.fromkeys((*model.layout.outer, *model.after_blocks, *blocks)))


@contextmanager
def _shipped(model: StreamedModel, replay: Replay, shipment: Shipment, served: Mapping[int, Served]) -> Iterator[None]:
    """The whole model with the numbers of a shipment, and its inputs rounded where a server rounds them."""
    with ExitStack() as stack:
        stack.enter_context(replay.whole(shipment))
        for index, roundings in served.items():
            stack.enter_context(roundings.within(model.blocks[index]))
        yield
