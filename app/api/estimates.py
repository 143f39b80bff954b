"""Rough numbers for a dry run: bytes on disk, memory, time. Meant to be right within a factor of about two."""

from typing import Any

from app.api.inspection import Inspection
from app.domain.adapter_rules import trained_parameters
from app.domain.formats import ExportFormat
from app.domain.jobs import JobRequest
from app.domain.methods import METHODS, SCALE_BATCH_SIZE, SCALE_BITS
from app.domain.sources import GeneratedText

HEAVY_BYTES = 2  # bf16
TUNING_BYTES = 16
"""A weight under tuning: itself, its fp32 copy, rounding offset and gradient."""
FLOPS_PER_SECOND = {"cpu": 6e10, "cuda": 1.5e14}
"""What a small CPU worker and a data-centre GPU sustain in this engine's block passes."""
BACKWARD = 3.5
"""Forward, backward and recomputing of fake-quantized weights, in forward passes."""

TRAINING = 2.0
"""Forward, and backward for activations alone, in forward passes: no weight of the base has a gradient."""


def estimate(request: JobRequest, inspection: Inspection) -> dict[str, Any]:
    """Estimates of a job on a checkpoint that could be looked at."""
    block_weights = sum(out * width for out, width in inspection.dimensions.block_linears().values())
    quantized, bits = _quantized_bits(request, inspection)
    rest = max(inspection.weights - quantized, 0)
    checkpoint = int(bits / 8 + rest * HEAVY_BYTES)
    activations = _activation_bytes(request, inspection)
    tuned = _tuned_sequences(request) > 0
    # The model writes its own calibration text, which takes all of it and a third of that for keys and values.
    generated = _calibration_tokens(request) > 0 and isinstance(request.calibration.dataset, GeneratedText)
    resident = inspection.tensor_bytes * 4 // 3 if generated else 0
    resident = max(resident, _training_bytes(request, inspection, checkpoint))
    taken = checkpoint if request.base_job else 0  # the earlier job's native checkpoint, on the worker's disk
    return {
        "weights": inspection.weights,
        "weights_quantized": quantized,
        "bits_per_weight": round(bits / quantized, 3) if quantized else None,
        "bytes_original": inspection.tensor_bytes,
        "bytes_checkpoint": checkpoint,
        "adapter_parameters": _adapter_parameters(request, inspection),
        "disk_bytes": _checkpoints_bytes(request, inspection, checkpoint) + int(bits / 8) + taken,
        "host_memory_bytes": activations + 4 * block_weights * HEAVY_BYTES + (1 << 30),
        "device_memory_bytes": max(block_weights * (TUNING_BYTES if tuned else 2 * HEAVY_BYTES), resident) + (1 << 30),
        "seconds": {device: round(_flops(request, inspection) / speed) for device, speed in FLOPS_PER_SECOND.items()},
    }


def _adapter_parameters(request: JobRequest, inspection: Inspection) -> int | None:
    """Trainable numbers; None where nothing is trained."""
    if request.adapter is None:
        return None
    return trained_parameters(request.quantization, request.adapter, inspection.dimensions.linears())


def _training_bytes(request: JobRequest, inspection: Inspection, packed: int) -> int:
    """Finetuning holds the quantized model whole, and of each parameter of the adapter value, gradient and moments."""
    if request.finetune is None:
        return 0
    states = 16 * (_adapter_parameters(request, inspection) or 0)
    block = max(out * width for out, width in inspection.dimensions.block_linears().values())
    return packed + states + block * HEAVY_BYTES


def _trained_tokens(request: JobRequest) -> int:
    part = request.finetune
    return 0 if part is None else part.steps * part.batch_size * part.sequence_length


def _quantized_bits(request: JobRequest, inspection: Inspection) -> tuple[int, float]:
    """Weights that are quantized, and the bits of what is stored of them, low-rank factors included."""
    quantized, bits = 0, 0.0
    factor_bits, budget = request.quantization.factors_rank() * HEAVY_BYTES * 8, request.quantization.budget()
    for name, (out, width) in inspection.dimensions.linears().items():
        scheme = request.quantization.scheme(name)
        if scheme is not None:
            each = scheme.bits_per_weight(width, SCALE_BITS) if budget is None else budget.average
            quantized += out * width
            bits += out * width * each + factor_bits * (out + width)
    return quantized, bits


def _checkpoints_bytes(request: JobRequest, inspection: Inspection, packed: int) -> int:
    """All checkpoints of the job; `packed` is the size of one that stores what the method made."""
    dense, formats = inspection.weights * HEAVY_BYTES, {*request.formats, ExportFormat.NATIVE}
    return sum(dense if name is ExportFormat.MERGED else packed for name in formats if name is not ExportFormat.PEFT)


def _activation_bytes(request: JobRequest, inspection: Inspection) -> int:
    """Hidden states that are kept: inputs, targets and the quantized stream to calibrate, two streams to evaluate."""
    tokens = 3 * _calibration_tokens(request) + 2 * _evaluation_tokens(request)
    return tokens * inspection.dimensions.hidden * HEAVY_BYTES


def _calibration_tokens(request: JobRequest) -> int:
    needed = METHODS[request.quantization.method].needs_calibration or request.quantization.budget() is not None
    read = needed and request.base_job is None
    return request.calibration.num_samples * request.calibration.sequence_length if read else 0


def _tuned_sequences(request: JobRequest) -> int:
    """Of each block; none where blocks are taken from an earlier job."""
    return 0 if request.base_job else request.quantization.tuned_sequences(request.calibration.num_samples)


def _evaluation_tokens(request: JobRequest) -> int:
    part = request.evaluation
    return 0 if part is None else part.num_samples * part.sequence_length


def _flops(request: JobRequest, inspection: Inspection) -> float:
    dimensions, calibration = inspection.dimensions, request.calibration
    linear_flops = 2.0 * sum(out * width for out, width in dimensions.linears().values())
    passes = 3 if request.quantization.budget() is None else 4  # capture, targets, quantized stream; sensitivities
    forward = passes * _calibration_tokens(request)
    tuned = _tuned_sequences(request) * calibration.sequence_length
    evaluated = _evaluation_tokens(request)
    sequences = min(SCALE_BATCH_SIZE, calibration.num_samples)
    scale_steps = 0 if request.base_job else request.quantization.end_to_end_steps()
    scaled = scale_steps * sequences * calibration.sequence_length
    head = 2.0 * dimensions.vocabulary * dimensions.hidden
    trained = _trained_tokens(request)
    through_blocks = linear_flops * (forward + BACKWARD * (tuned + scaled) + TRAINING * trained + 2 * evaluated)
    return through_blocks + head * (2 * evaluated + 3 * scaled + TRAINING * trained)  # teacher, student, and back
