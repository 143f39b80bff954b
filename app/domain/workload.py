"""Cost of a job in floating-point operations, and what follows from it: estimates, and the reference row.

The reference row of a report is what round to nearest makes of the same scheme on the same text, so that a figure of a
method can be judged by what doing nothing clever gives. It is measured where it costs less than a tenth of the job.
"""

from dataclasses import dataclass
from typing import Protocol

from app.domain.methods import SCALE_BATCH_SIZE
from app.domain.request.job_request import JobRequest


class Sized(Protocol):
    """A model as far as its work goes: weights of all blocks' linears, and of the head."""

    @property
    def block_weights(self) -> int: ...
    @property
    def head_weights(self) -> int: ...


@dataclass(frozen=True)
class ModelSize:
    """The size of a model that is open."""

    block_weights: int
    head_weights: int


BACKWARD = 3.5
"""Forward, backward and recomputing of fake-quantized weights, in forward passes."""
TRAINING = 2.0
"""Forward, and backward for activations alone, in forward passes: no weight of the base has a gradient."""
REFERENCE_SHARE = 0.1
"""Of a job's work that its reference row may add."""


def readers_of(request: JobRequest) -> list[str]:
    """The parts of a request that read text, and so need the model's tokenizer."""
    parts = {
        "finetune": request.finetune is not None,
        "calibration": request.base_job is None and request.quantization.reads_text(),
        "evaluation": request.evaluation is not None,
    }
    return [name for name, reads in parts.items() if reads]


def calibration_tokens(request: JobRequest) -> int:
    """Tokens that are asked for; none where no text calibrates."""
    read = request.base_job is None and request.quantization.reads_text()
    return request.calibration.num_samples * request.calibration.sequence_length if read else 0


def further_tokens(request: JobRequest) -> int:
    """Tokens that only end-to-end steps see; none where there are no such steps."""
    if request.base_job is not None or not request.quantization.end_to_end_steps():
        return 0
    text = request.calibration
    after_text = text.written_samples // 2  # in place of further ones that the text lacks
    free = text.written_samples - after_text
    return (free + max(text.further_samples, after_text)) * text.sequence_length


def evaluation_tokens(request: JobRequest) -> int:
    """Tokens of evaluation."""
    section = request.evaluation
    return 0 if section is None else section.tokens_read


def trained_tokens(request: JobRequest) -> int:
    """Tokens that all steps of finetuning read at the most."""
    section = request.finetune
    return 0 if section is None else section.steps * section.batch_size * section.sequence_length


def tuned_sequences(request: JobRequest) -> int:
    """Of each block; none where blocks are taken from a base job."""
    return 0 if request.base_job else request.quantization.tuned_sequences(request.calibration.num_samples)


def flops(request: JobRequest, size: Sized) -> float:
    """Of the whole job, but for the reference row."""
    calibration = request.calibration
    passes = 4 if request.quantization.chooses() else 3  # capture, targets, quantized activations; sensitivities
    forward = passes * calibration_tokens(request) + further_tokens(request)
    rounds = 1 if request.base_job else request.quantization.most_rounds()
    tuned = rounds * tuned_sequences(request) * calibration.sequence_length
    evaluated = evaluation_tokens(request)
    sequences = min(SCALE_BATCH_SIZE, calibration.num_samples)
    scale_steps = 0 if request.base_job else request.quantization.end_to_end_steps()
    scaled = scale_steps * sequences * calibration.sequence_length
    trained = trained_tokens(request)
    through_blocks = forward + BACKWARD * (tuned + scaled) + TRAINING * trained + 2 * evaluated
    # Teacher, student, and back.
    through_head = 2 * evaluated + 3 * scaled + TRAINING * trained
    return _block_flops(size) * through_blocks + _head_flops(size) * through_head


def reference_flops(request: JobRequest, size: Sized) -> float:
    """Of the reference row: one more pass of the evaluation text, and the logits of both models again."""
    return evaluation_tokens(request) * (_block_flops(size) + 2 * _head_flops(size))


def has_reference(request: JobRequest, size: Sized) -> bool:
    """True if a job measures what round to nearest makes of its schemes, besides what it makes itself."""
    if request.evaluation is None or (request.quantization.method == "rtn" and request.finetune is None):
        return False
    return reference_flops(request, size) < REFERENCE_SHARE * flops(request, size)


def _block_flops(size: Sized) -> float:
    """Of a token's forward pass through all blocks."""
    return 2.0 * size.block_weights


def _head_flops(size: Sized) -> float:
    return 2.0 * size.head_weights
