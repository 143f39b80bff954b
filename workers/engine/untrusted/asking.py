"""A job's input, read by a limited child for the attempt: the first rank asks, the others wait for what it was told.

    inputs = JobInput.of(order, workspace, rank)
    inputs.ask()                  # the child reads the model, then the texts
    inputs.try_model()            # before any library of this process sees the configuration
    texts = inputs.texts()        # read while this process opens the model

Where an order does not ask for it (whoever runs the engine without a supervisor), nothing is tried, and the engine
reads the texts in its own process.
"""

import time
from pathlib import Path
from typing import Literal

from app.limited.limits import Ended, Limits, Outcome
from app.limited.process import Handle, LimitedProcess
from bitwright.errors import InternalError, OverLimit
from workers.disk.durable import replace_file
from workers.disk.input_orders import InputAnswer, InputOrder
from workers.disk.orders import AttemptOrder, WarmChild
from workers.disk.task_rows import AskedTask, AskedTasks
from workers.engine.device.process_group import PATIENCE
from workers.engine.job_texts import Texts
from workers.engine.text.stored_texts import LoadedTexts
from workers.engine.untrusted.reading import SOURCE, TASKS, TOKENS

LOOK_AGAIN_SECONDS = 0.05
MARGIN_SECONDS = 10.0
"""The child ends what takes too long; this process ends the child where it does not."""
OWN_BYTES = 2 << 30
"""Of the child, with all that it has imported."""
BYTES_A_SECOND = 1 << 20
"""Of a text: what reading it is given more."""
ANSWER_BYTES = 1 << 20

Part = Literal["model", "texts"]


class JobInput:
    """The input of a job, as one of its ranks gets it; what is read of it lies in the folder `place`."""

    def __init__(self, order: AttemptOrder, place: Path, rank: int, child: LimitedProcess | None) -> None:
        self.order, self.place, self.rank, self.child = order, place, rank, child
        self._asked = 0.0

    @classmethod
    def of(cls, order: AttemptOrder, workspace: Path, rank: int) -> "JobInput":
        """The input of an order; what is read of it lies in a folder of the workspace, one for each attempt."""
        warm: WarmChild | None = order.warm
        child = None if warm is None or rank else LimitedProcess(Handle(warm.orders, warm.answers, warm.pid))
        return cls(order, workspace / f"input-{order.attempt}", rank, child)

    @property
    def limited(self) -> bool:
        """True if another process reads it."""
        return self.order.warm is not None and self.order.limits_input

    @property
    def presented(self) -> Path | None:
        """Folder of a quantized source as the child has presented it, whose tokenizer is read."""
        return self.place / SOURCE if self.limited else None

    def ask(self) -> None:
        """Let the child begin, first with the model; it goes on with the texts while this process opens that."""
        if not self.limited or self.rank:
            return
        self.place.mkdir(parents=True, exist_ok=True)
        order = InputOrder(
            order=self.order,
            place=str(self.place),
            memory_bytes=self.order.input_memory_bytes,
            seconds=self.order.input_seconds,
            text_seconds=self._text_seconds(),
        )
        self._asked = time.monotonic()
        assert self.child is not None  # noqa: S101 - for the type checker
        self.child.send(order.model_dump_json().encode() + b"\n")

    def try_model(self) -> None:
        """Wait until the child has opened the checkpoint and built what its configuration says.

        Raises:
            InputError: what it met.
            OverLimit: it took more than it may.
        """
        if self.limited:
            self._answer("model", self.order.input_seconds)

    def texts(self) -> Texts:
        """The texts that it has read; nothing where no part of the job reads text. Raises as `try_model`."""
        if not self.limited:
            return Texts(None, None)
        line = self._answer("texts", self.order.input_seconds + self._text_seconds()).texts
        if line is None:
            return Texts(None, None)
        request = self.order.request
        calibration, evaluation, finetune = request.calibration, request.evaluation, request.finetune
        try:
            loaded = LoadedTexts(self.place / TOKENS, line)
            return Texts(
                loaded.sequences("calibration", calibration),
                None if evaluation is None else loaded.sequences("evaluation", evaluation),
                None if finetune is None else loaded.finetuning(finetune.sequence_length),
                () if evaluation is None else self._tasks(len(evaluation.tasks)),
                () if evaluation is None else loaded.probes(evaluation.sequence_length),
            )
        except (ValueError, KeyError, OSError) as error:
            raise InternalError(f"what was read of the texts is none: {error}") from error

    def _tasks(self, count: int) -> tuple[AskedTask, ...]:
        """The rows of the tasks, checked: whoever wrote them may have been made to write anything."""
        tasks = AskedTasks.model_validate_json((self.place / TASKS).read_bytes()).tasks
        if len(tasks) != count:
            raise ValueError(f"{len(tasks)} tasks were read of {count}")
        return tasks

    def _answer(self, part: Part, seconds: float) -> InputAnswer:
        """The child's next answer, or what the first rank was told."""
        if self.rank:
            return self._told(part)
        assert self.child is not None  # noqa: S101 - for the type checker
        limits = Limits(
            seconds=seconds + MARGIN_SECONDS,
            memory_bytes=2 * self.order.input_memory_bytes + OWN_BYTES,
            answer_bytes=ANSWER_BYTES,
        )
        outcome = self.child.hear(limits, self._asked)
        if outcome.ended is not Ended.ANSWERED:
            raise _of_outcome(outcome)
        answer = InputAnswer.model_validate_json(outcome.answer)
        if answer.error is not None:
            raise answer.error.exception()
        if self.order.world_size > 1:
            self._tell(part, answer)
        return answer

    def _text_seconds(self) -> float:
        order = self.order
        size = sum(file.stat().st_size for file in order.text_files if file.is_file())
        return order.input_seconds + size / BYTES_A_SECOND

    def _tell(self, part: Part, answer: InputAnswer) -> None:
        replace_file(self.place / f"{part}.json", answer.model_dump_json().encode())

    def _told(self, part: Part) -> InputAnswer:
        """The answer that the first rank was given; where that was an error, it ends this rank, too."""
        file, until = self.place / f"{part}.json", time.monotonic() + PATIENCE.total_seconds()
        while not file.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"no rank has written {file.name}")
            time.sleep(LOOK_AGAIN_SECONDS)
        return InputAnswer.model_validate_json(file.read_bytes())


def _of_outcome(outcome: Outcome) -> OverLimit | InternalError:
    """The error of a child that gave no answer: its own limits are not what ended it."""
    if outcome.ended is Ended.DIED:
        return InternalError(f"the child that reads the job's input has ended: {outcome.words}")
    hint = "look for a chat template or a tokenizer that does not end, or that multiplies; or give shorter texts"
    return OverLimit(f"what reads the job's input was ended: {outcome.words}", field="model", hint=hint)
