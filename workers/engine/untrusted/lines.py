"""Orders to a child that reads a job's input, and its answers: a line of JSON each."""

from typing import Literal

from pydantic import Field

from bitwright.events import ErrorData, Message
from workers.disk.orders import AttemptOrder
from workers.engine.text.stored_texts import TextsLine


class InputOrder(Message):
    """Read a part of a job's input as the attempt is going to, within limits.

    part          `model`: the checkpoint's configuration, its modules and buffers, without weights; its tokenizer.
                  `texts`: all texts through the tokenizer and its chat template
    place         folder for what is made, absolute
    memory_bytes  that it may take beyond what the child has
    seconds       of wall time that it may take
    """

    part: Literal["model", "texts"]
    order: AttemptOrder
    place: str
    memory_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class InputAnswer(Message):
    """The outcome: `error`, or what was read."""

    error: ErrorData | None = None
    texts: TextsLine | None = None
