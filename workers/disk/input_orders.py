"""Orders to a child that reads a job's input, and its answers: a line of JSON each, two for an order that is obeyed."""

from pydantic import Field

from bitwright.events import ErrorData, Message
from workers.disk.orders import AttemptOrder


class InputOrder(Message):
    """Read a job's input as its attempt is going to, within limits: first the model, then the texts.

    model   the checkpoint's configuration, its modules and buffers, without weights
    texts   all texts through the tokenizer and its chat template; the tokenizer alone where nothing reads text

    place          folder for what is made, absolute
    memory_bytes   that it may take beyond what the child has
    seconds, text_seconds   of wall time that each may take
    """

    order: AttemptOrder
    place: str
    memory_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)
    text_seconds: float = Field(gt=0)


class StoredNotes(Message):
    """Notes on the rows of a text (`workers.engine.text.documents`)."""

    rows: int = 0
    empty: int = 0
    ignored: dict[str, int] = Field(default_factory=dict)
    left_out: int = 0


class StoredSequences(Message):
    """Sequences of a text without their tokens."""

    source: str
    overlapping: bool
    text_tokens: int | None
    notes: StoredNotes


class StoredFinetuning(Message):
    """The text of a training without its tokens."""

    sha256: str
    cut: int
    dropped: int
    notes: StoredNotes


class StoredProbe(Message):
    """Sequences that are measured beside the evaluation text, without their tokens."""

    name: str
    share: float | None
    sequences: int
    whole: int


class TextsLine(Message):
    """The texts of a job without their tokens."""

    probes: tuple[StoredProbe, ...] = ()

    calibration: StoredSequences | None = None
    evaluation: StoredSequences | None = None
    finetuning: StoredFinetuning | None = None


class InputAnswer(Message):
    """The outcome of a part: `error`, or what was read. After an error there is no further answer."""

    error: ErrorData | None = None
    texts: TextsLine | None = None
