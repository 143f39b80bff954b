"""Rough numbers for a dry run: bytes on disk, memory, time. Meant to be right within a factor of about two."""

from collections.abc import Sequence
from math import prod
from typing import Any

from app.domain.fit import does_without_model
from app.domain.format_rules import holds_base_alone, stored_formats
from app.domain.goals.reach import byte_limit
from app.domain.inputs.architectures import Dimensions
from app.domain.inputs.inspection import Inspection
from app.domain.methods import SCALE_BITS, Form
from app.domain.methods.module_rules import unties
from app.domain.mixes import bound_to
from app.domain.request.combination_rules import trained_parameters
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import GeneratedText
from app.domain.sizes.files import Matrix, Rest, file_bytes
from app.domain.sizes.untied_heads import is_tied, outer_shape
from app.domain.weight_targets import has_head, is_embeddings, seen_tensors, weight_targets
from app.domain.workload import (
    calibration_tokens,
    evaluation_tokens,
    flops,
    has_reference,
    reference_flops,
    tuned_sequences,
)

HEAVY_BYTES = 2  # bf16
TUNING_BYTES = 16
"""A weight under tuning: itself, its fp32 copy, rounding offset and gradient."""
FLOPS_PER_SECOND = {"cpu": 6e10, "cuda": 1.5e14}
"""Rates that a small CPU worker and a data-centre GPU sustain in this engine's block passes."""


BYTES_PER_SECOND = 2e8
"""Rate at which tensors are read, rounded, packed and written where no model is built."""
LARGEST_TENSOR = 2 << 30
"""Host memory that a large tensor's part takes in fp32, with what is being written."""


def estimate(request: JobRequest, inspection: Inspection) -> dict[str, Any]:
    """Estimates of a job on a checkpoint that could be looked at."""
    accepted, request = inspection.dimensions is not None, bound_to(request, inspection)
    if inspection.dimensions is None or does_without_model(request, accepted=accepted):
        return _estimate_without_model(request, inspection)
    return _estimate(request, inspection, inspection.dimensions)


def _estimate_without_model(request: JobRequest, inspection: Inspection) -> dict[str, Any]:
    """The same where tensors of files are quantized one by one; without their headers, as if all were linears."""
    spec, default = request.quantization, request.quantization.schemes()[0][1]
    if not inspection.tensors:
        matrices = [Matrix((inspection.weights, 1), None, default.bits_per_weight(1 << 16, SCALE_BITS))]
    else:
        tensors = seen_tensors(inspection.tensors, spec)
        codebook, tied = Form.CODEBOOK in spec.forms(), not has_head(tensors)
        linears = weight_targets(tensors, inspection.config, spec).linears
        matrices = [
            Matrix(target.shape, target.scheme, twice=tied)
            if is_embeddings(target.name)
            else Matrix(target.shape, target.scheme, absmax=spec.absmax(), codebook=codebook)
            for target in linears
        ]
    sizes = _sizes(request, inspection, matrices)
    dense = max(inspection.weights * HEAVY_BYTES, inspection.tensor_bytes)
    rows = [name.info for name in stored_formats(request.formats)]
    written = sum(dense if info.dense else sizes["bytes_checkpoint"] for info in rows if not info.is_adapter)
    seconds = round((inspection.tensor_bytes + written) / BYTES_PER_SECOND)
    return {
        **sizes,
        "adapter_parameters": None,
        "disk_bytes": written,
        "host_memory_bytes": min(LARGEST_TENSOR, inspection.tensor_bytes) + (1 << 30),
        "device_memory_bytes": 0,
        "seconds": dict.fromkeys(FLOPS_PER_SECOND, seconds),
    }


def _sizes(request: JobRequest, inspection: Inspection, matrices: Sequence[Matrix]) -> dict[str, Any]:
    """Sizes of the whole model first, then of what is quantized of it."""
    # Weights of a quantized head that are not the model's own, but its embeddings' once more.
    untied = prod(outer_shape(inspection) or (0,)) if _unties(request, inspection) else 0
    quantized, bits = sum(matrix.weights for matrix in matrices), sum(matrix.native_bits for matrix in matrices)
    kept = max(inspection.weights - quantized + untied, 0)
    checkpoint = _as_asked(request, inspection, int(bits / 8 + kept * HEAVY_BYTES))
    width = inspection.tensor_bytes / max(1, inspection.weights)
    vocabulary = 0 if inspection.dimensions is None else inspection.dimensions.vocabulary
    rest = Rest(round(kept * width), max(0, len(inspection.tensors) - len(matrices)), width, vocabulary)
    formats, adapter = stored_formats(request.formats), _adapter_parameters(request, inspection.dimensions) or 0
    alone = {name: holds_base_alone(name, formats) for name in formats}
    return {
        "bytes_files": {
            name.value: _as_asked(
                request,
                inspection,
                file_bytes(name, matrices, rest, base_alone=alone[name], adapter=adapter),
                dense=name.info.dense or name.info.is_adapter,
            )
            for name in formats
        },
        "bytes_original": inspection.tensor_bytes,
        "bytes_checkpoint": checkpoint,
        "bits_per_weight_model": round(checkpoint * 8 / inspection.weights, 3) if inspection.weights else None,
        "weights": inspection.weights,
        "weights_quantized": quantized,
        "bits_per_weight": round(bits / quantized, 3) if quantized else None,
    }


def _estimate(request: JobRequest, inspection: Inspection, dimensions: Dimensions) -> dict[str, Any]:
    block_weights = sum(out * width for out, width in dimensions.block_linears().values())
    matrices = _matrices(request, dimensions)
    sizes = _sizes(request, inspection, matrices)
    checkpoint, bits = sizes["bytes_checkpoint"], sum(matrix.native_bits for matrix in matrices)
    activations = _activation_bytes(request, dimensions)
    tuned = tuned_sequences(request) > 0
    # The model writes text of its own, which takes all of it and a third of that for keys and values.
    generated = calibration_tokens(request) > 0 and isinstance(request.calibration.dataset, GeneratedText)
    resident = inspection.tensor_bytes * 4 // 3 if generated else 0
    if request.evaluation is not None and request.evaluation.tasks:
        resident = max(resident, inspection.tensor_bytes * 5 // 4)  # tasks ask the whole model
    resident = max(resident, _training_bytes(request, dimensions, checkpoint))
    reference = has_reference(request, dimensions)
    work = flops(request, dimensions)
    work += reference_flops(request, dimensions) if reference else 0
    taken = checkpoint if request.base_job else 0  # the base job's native checkpoint, on the worker's disk
    return {
        **sizes,
        "adapter_parameters": _adapter_parameters(request, dimensions),
        # Towards a goal the blocks of two points are kept at a time.
        "disk_bytes": _checkpoints_bytes(request, inspection, checkpoint)
        + int(bits / 8) * min(2, request.quantization.most_rounds())
        + taken,
        "host_memory_bytes": activations + 4 * block_weights * HEAVY_BYTES + (1 << 30),
        "device_memory_bytes": max(block_weights * (TUNING_BYTES if tuned else 2 * HEAVY_BYTES), resident) + (1 << 30),
        "seconds": {device: round(work / speed) for device, speed in FLOPS_PER_SECOND.items()},
    }


def _unties(request: JobRequest, inspection: Inspection) -> bool:
    """True if a tied head is stored apart, because it alone is quantized."""
    return unties(request.quantization) and is_tied(inspection)


def _adapter_parameters(request: JobRequest, dimensions: Dimensions | None) -> int | None:
    """Trainable numbers; None where nothing is trained."""
    if request.adapter is None or dimensions is None:
        return None
    return trained_parameters(request.quantization, request.adapter, dimensions.linears())


def _training_bytes(request: JobRequest, dimensions: Dimensions, packed: int) -> int:
    """Finetuning holds the quantized model whole, and of each parameter of the adapter value, gradient and moments."""
    if request.finetune is None:
        return 0
    states = 16 * (_adapter_parameters(request, dimensions) or 0)
    block = max((out * width for out, width in dimensions.block_linears().values()), default=0)
    return packed + states + block * HEAVY_BYTES


def _matrices(request: JobRequest, dimensions: Dimensions) -> list[Matrix]:
    """Everything that is quantized: linears of the blocks, embeddings, and the head."""
    spec, found = request.quantization, list[Matrix]()
    codebook = Form.CODEBOOK in spec.forms()
    budget, outer = spec.budget(), (dimensions.vocabulary, dimensions.hidden)
    for name, shape in dimensions.linears().items():
        scheme = spec.scheme_of(name)
        if scheme is not None and budget is not None:
            found.append(Matrix(shape, None, budget.average, rank=spec.factors_rank()))
        elif scheme is not None:
            found.append(Matrix(shape, scheme, absmax=spec.absmax(), codebook=codebook, rank=spec.factors_rank()))
    # Rounded to nearest whatever the method, outside any budget, and without factors.
    embeddings, head, tied = spec.embeddings_scheme(), spec.head_scheme(), dimensions.tied_embeddings
    if embeddings is not None:
        found.append(Matrix(outer, embeddings, twice=tied))
    if head is not None and (not tied or unties(spec)):
        found.append(Matrix(outer, head))
    return found


def _as_asked(request: JobRequest, inspection: Inspection, widest: int, *, dense: bool = False) -> int:
    """Bytes of a packed checkpoint as a size or a budget over the model asks for; else `widest`, of wide choices."""
    spec = request.quantization
    budget, limit = spec.budget(), byte_limit(spec, inspection.config)
    if dense:
        return widest
    if budget is not None and budget.over == "model":
        return int(budget.average * inspection.weights / 8)
    return widest if limit is None else min(widest, limit)


def _checkpoints_bytes(request: JobRequest, inspection: Inspection, packed: int) -> int:
    """All checkpoints of the job; `packed` is the size of one that stores what the method made."""
    rows = [name.info for name in stored_formats(request.formats)]
    dense = inspection.weights * HEAVY_BYTES
    return sum(dense if info.dense else packed for info in rows if not info.is_adapter)


def _activation_bytes(request: JobRequest, dimensions: Dimensions) -> int:
    """Hidden states that are kept: inputs, targets and the quantized stream to calibrate, two to evaluate, and a third
    for the reference row."""
    streams = 3 if has_reference(request, dimensions) else 2
    tokens = 3 * calibration_tokens(request) + streams * evaluation_tokens(request)
    return tokens * dimensions.hidden * HEAVY_BYTES
