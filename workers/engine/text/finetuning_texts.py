"""The training text of a request: examples, and the sequences packed of them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from app.domain.request.finetuning import Finetune
from workers.engine.text.documents import Half
from workers.engine.text.examples import Examples, read_examples
from workers.engine.text.packing import PackedSequences


@dataclass(frozen=True)
class FinetuningTexts:
    """Finetuning data of a job: its rows, and the sequences that they make."""

    examples: Examples
    training: PackedSequences
    held_out: PackedSequences | None
    sha256: str


def read_finetuning_texts(
    tokenizer: PreTrainedTokenizerBase, config: Finetune, path: Path | None, evaluation_path: Path | None
) -> FinetuningTexts:
    """The text of a request; of the calibration half where the evaluation reads the same file.

    Raises:
        InvalidDataset: a row cannot be learned, or nothing is left to learn.
    """
    shared = path is not None and evaluation_path is not None and path.samefile(evaluation_path)
    examples = read_examples(tokenizer, config, path, Half.CALIBRATION if shared else None)
    training, held_out = (
        PackedSequences.pack(kept, config.sequence_length, together=config.packing) if kept else None
        for kept in (examples.training, examples.validation)
    )
    assert training is not None  # noqa: S101 - for the type checker; else reading would have failed
    return FinetuningTexts(examples, training, held_out, examples.sha256)
