"""The report of a job without a model: sizes and weight errors; there is nothing that could have been evaluated."""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import reduce
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch

from app.domain.formats import ExportFormat
from app.domain.methods.spec_words import in_words
from app.domain.weight_targets import FLOATING, Targets, is_embeddings, is_head, text_config
from bitwright.report import (
    BlockReport,
    LinearReport,
    ModelReport,
    PeakMemory,
    Report,
    SizeReport,
    StoredParts,
)
from workers.disk.orders import AttemptOrder
from workers.engine.clock import StageClock, peak_memory
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.reporter import Reporter
from workers.engine.text.sequences import source_label
from workers.engine.weights_only.finished_parts import FinishedLinear, FinishedPart
from workers.engine.weights_only.parts import bytes_of
from workers.formats.cards.identity import Identity
from workers.formats.cards.model_card import stored_bytes
from workers.numerics.quantized import StoredBits

BLOCK = re.compile(r"^(.*?\.?(?:layers|h|blocks)\.\d+)\.")
CPU = torch.device("cpu")


def identity_of(order: AttemptOrder) -> Identity:
    """Identity of the result."""
    request, model = order.request, source_label(order.request.model)
    return Identity(
        version=version("bitwright"),
        model=model,
        model_id=model if request.model.source == "hub" else None,
        revision=order.model_revision,
        method=request.quantization.method,
        scheme=in_words(request.quantization),
    )


def report_of(
    order: AttemptOrder,
    checkpoint: Checkpoint,
    targets: Targets,
    parts: Sequence[FinishedPart],
    resumed: int,
    clock: StageClock,
    reporter: Reporter,
) -> Report:
    """The report; `resumed` of the parts are an earlier attempt's."""
    request = order.request
    earlier = {linear.report.name for part in parts[:resumed] for linear in part.linears}
    blocks = blocks_of([linear for part in parts for linear in part.linears if not _is_outer(linear.report.name)])
    taken_over = sum(all(linear.name in earlier for linear in block.linears) for block in blocks)
    matrices = [linear.report for part in parts for linear in part.linears if is_embeddings(linear.report.name)]
    heads = [linear.report for part in parts for linear in part.linears if is_head(linear.report.name)]
    return Report(
        version=version("bitwright"),
        method=request.quantization.method,
        scheme=in_words(request.quantization),
        seed=request.seed,
        device=order.device,
        plan={"device": "cpu", "weights_only": True, "parts": len(parts), "threads": torch.get_num_threads()},
        model=model_report(order, checkpoint, targets),
        calibration=None,
        quality=None,
        embeddings=matrices[0] if matrices else None,
        head=heads[0] if heads else None,
        blocks=blocks,
        size=size_of(checkpoint, targets, reduce(lambda one, more: one + more.stored, parts, StoredBits())),
        seconds=clock.seconds(),
        peak_memory=PeakMemory(host_bytes=peak_memory(CPU).host_bytes),
        blocks_computed=len(blocks) - taken_over,
        blocks_resumed=taken_over,
        warnings=tuple(reporter.warnings),
    )


def _is_outer(name: str) -> bool:
    return is_head(name) or is_embeddings(name)


def with_files(report: Report, folder: Path, formats: Collection[ExportFormat]) -> Report:
    """The report with the bytes of the weight files in finished checkpoints, each in a folder of its format's name."""
    files = {name.value: stored_bytes(folder / name.value, name.info.weight_files) for name in formats}
    return report.model_copy(update={"size": report.size.model_copy(update={"bytes_files": files})})


def model_report(order: AttemptOrder, checkpoint: Checkpoint, targets: Targets) -> ModelReport:
    """The model as its configuration names it; its dtype is that of most weights that are quantized."""
    config, request = checkpoint.config, order.request
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else config.get("model_type") or "unknown"
    dtype = config.get("dtype") or config.get("torch_dtype") or text_config(config).get("dtype")
    stored = checkpoint.tensors[targets.linears[0].tensor].dtype
    return ModelReport(
        source=source_label(request.model),
        kind=request.model.source,
        revision=order.model_revision,
        architecture=str(architecture)[:200],
        dtype=str(dtype or stored.lower())[:40],
        parameters=_parameters(checkpoint),
    )


def blocks_of(linears: Sequence[FinishedLinear]) -> tuple[BlockReport, ...]:
    """The linears by the layer that they are in, as their names say, in their order."""
    groups: dict[str, list[FinishedLinear]] = {}
    for linear in linears:
        groups.setdefault(block_name(linear.report), []).append(linear)
    return tuple(
        BlockReport(
            index=index,
            name=name,
            loss_initial=None,
            loss=None,
            output_error=None,
            seconds=sum(linear.seconds for linear in own),
            linears=tuple(linear.report for linear in own),
        )
        for index, (name, own) in enumerate(groups.items())
    )


def block_name(linear: LinearReport) -> str:
    """Name of the layer that a linear is in; of one that is in none, of its module."""
    found = BLOCK.match(linear.name)
    return found[1] if found else linear.name.rpartition(".")[0] or linear.name


def size_of(checkpoint: Checkpoint, targets: Targets, stored: StoredBits) -> SizeReport:
    """Sizes before and after; `stored` are the bits of all quantized linears."""
    whole = sum(bytes_of(tensor) for tensor in checkpoint.tensors.values())
    before = sum(bytes_of(tensor) for tensor in checkpoint.tensors.values() if tensor.copies is None)
    width = {name: bytes_of(tensor) / max(1, prod(tensor.shape)) for name, tensor in checkpoint.tensors.items()}
    quantized = sum(int(prod(target.shape) * width[target.tensor]) for target in targets.linears)
    after, count = whole - quantized + stored.total // 8, max(1, targets.weights)
    return SizeReport(
        bytes_original=before,
        bytes_quantized=after,
        quantized_weights=targets.weights,
        bits_per_weight=stored.total / count,
        bits_per_weight_model=after * 8 / max(1, _parameters(checkpoint)),
        parts=StoredParts(**{name: bits / count for name, bits in asdict(stored).items()}),
    )


def _parameters(checkpoint: Checkpoint) -> int:
    own = [tensor for tensor in checkpoint.tensors.values() if tensor.copies is None]
    return sum(prod(tensor.shape) for tensor in own if tensor.dtype in FLOATING)
