"""Closeness of the quantized model to the original: perplexity, KL divergence and top-1 agreement.

With p the original's and q the quantized model's distribution of the next token x_{t+1}, over all T tokens that have a
token before them in their sequence:

    perplexity = exp(-1/T sum log q(x_{t+1}))       KL = 1/T sum_t sum_v p(v) (log p(v) - log q(v))
    top-1 agreement = 1/T sum [argmax p = argmax q]

Activations of both are there when the last block is done; logits are made for some tokens at a time and dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.events import Stage
from bitwright.report import Figures, Quality
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.device.quick_products import quick_products
from workers.engine.finetune.stage import Finetuned
from workers.engine.job import Job
from workers.engine.memory import LOGITS_AT_ONCE
from workers.engine.model.overflow import original_overflows
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quality_sums import kind_warnings, quality_of
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.outer_matrices import plain_head
from workers.engine.quantize.stage import Quantized
from workers.engine.shipped import Replay, evaluated_key, shipments_of
from workers.engine.shipped_quality import Evaluated, QualityMeter, differences, evaluate
from workers.engine.tasks import stage as tasks
from workers.engine.text.mixture import Probe
from workers.engine.text.sequences import Sequences

CACHED_LOGITS = 262_144
"""Logits of a model that are compared at once for each thread of a CPU: they stay in its caches."""
PART = 64
"""Logits of a part whose maximum is found first."""


def run(job: Job, quantized: Quantized, finetuned: Finetuned | None) -> Evaluated | None:
    """Measures everything that ships, with the numbers that the export stores; None without evaluation text.

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    job.clock.enter(Stage.EVALUATE)
    activations, sequences = quantized.evaluation, job.texts.evaluation
    if activations is None or sequences is None:
        return None

    seeds = 1 if job.request.evaluation is None else job.request.evaluation.seeds
    of_text: dict[str, Any] = {"processes": job.processes, "probes": job.texts.probes, "seeds": seeds}

    def quality(states: Tensor, head: Tensor | None, tick: Callable[[float], None], **more: Any) -> Quality:
        given = {"quantized_head": head, "tick": tick, **of_text, **more}
        return measure(job.model, activations.original, states, sequences, **given)

    beside = _round_to_nearest(job, activations, quantized.head)

    def measured(head: Tensor | None, number: int, count: int) -> Quality:
        def tick(share: float) -> None:
            total = len(sequences.ids) * count
            job.reporter.progress(Stage.EVALUATE, (number + share) / count * total, total, "sequences")

        return quality(activations.quantized, head, tick, beside=beside if number == 0 else None)

    evaluated = evaluate(
        shipments_of(job),
        Replay(job.model, job.finished_blocks, None if finetuned is None else finetuned.trained),
        activations,
        QualityMeter(quantized.head, measured),
        merged=job.request.merge is not None,
        streamed=evaluated_key(job),
    )
    for name in ("perplexity_original", "perplexity", "kl_divergence", "top1_agreement"):
        job.reporter.metric(name, getattr(evaluated.quality, name))
    for code, message in differences(evaluated, None if finetuned is None else finetuned.report, _merging(job)):
        job.reporter.warning(code, message)
    for code, message in kind_warnings(evaluated.quality):
        job.reporter.warning(code, message)
    trained = None if finetuned is None else finetuned.trained
    evaluated = replace(evaluated, tasks=tasks.run(job, shipments_of(job)[0], trained, activations.served))
    if beside is None:
        return evaluated
    found = beside.found[0] if beside.found else quality(beside.states, beside.head, lambda _: None)
    job.reporter.metric("perplexity_round_to_nearest", found.perplexity)
    return replace(evaluated, reference=Figures.of(found))


@dataclass(frozen=True)
class Beside:
    """Hidden states that are measured in the pass of others, so that the original's logits are made once for both.

    states     after the last block, (sequences, length, width)
    head       dequantized weight of the head where it is not the original's
    found      gets the quality
    """

    states: Tensor
    head: Tensor | None
    found: list[Quality]


def _round_to_nearest(job: Job, activations: Activations, head: Tensor | None) -> Beside | None:
    """States and head of the row of round to nearest, where the report has one.

    head   the job's: embeddings and a head that is tied to them are rounded to nearest in every job
    """
    if activations.reference is None:
        return None
    if head is not None and job.model.layout.head in job.schemes:
        head = plain_head(job)
    return Beside(activations.reference, head, [])


def _merging(job: Job) -> str:
    """The effect of the request's merge, for a message."""
    if job.request.merge == "16bit":
        return "adding the adapter to rounded weights"
    return "rounding offsets to integer zero points" if job.request.round_offset else "folding the adapter into offsets"


@torch.no_grad()
def measure(
    model: StreamedModel,
    original: Tensor,
    quantized: Tensor,
    sequences: Sequences,
    *,
    quantized_head: Tensor | None,
    tick: Callable[[float], None],
    processes: ProcessGroup = SINGLE_PROCESS,
    beside: Beside | None = None,
    probes: Sequence[Probe] = (),
    seeds: int = 1,
) -> Quality:
    """Quality on `sequences`, whose hidden states after the last block are given, each (sequences, length, width).

    quantized_head  dequantized weight of the head where that is quantized too
    processes       those that measure together; the hidden states are of this one's share of the sequences
    beside          others that are measured, too
    probes          further sequences, whose hidden states follow those of `sequences`
    seeds           draws that the sequences are of, as many sequences each

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    head, others = model.model.get_submodule(model.layout.head), [] if beside is None else [beside]
    together = torch.cat([sequences.ids, *(probe.ids for probe in probes)])
    sums = torch.zeros(1 + len(others), len(together), 4, dtype=torch.float64)
    step = max(1, LOGITS_AT_ONCE[model.device.type] // model.vocabulary)
    ids = processes.share(together)
    own = processes.share(torch.arange(len(together))).tolist()
    count, length = ids.shape
    with model.loaded(*model.after_blocks), quick_products(head):
        weights = _weights(head.weight, [quantized_head, *(other.head for other in others)])
        states = (original, quantized, *(other.states for other in others))
        for row in range(count):
            for start in range(0, length - 1, step):
                positions = slice(start, min(start + step, length - 1))
                logits = []
                for hidden, weight in zip(states, weights, strict=True):
                    head.weight = weight
                    logits.append(model.logits(hidden[row : row + 1, positions].to(model.device))[0])
                labels = ids[row, positions.start + 1 : positions.stop + 1].to(model.device)
                sums[:, own[row]] += _token_sums(logits[0], logits[1:], labels)
            tick((row + 1) / count)
        head.weight = weights[0]
    processes.sum_(sums)
    if not bool(sums[0, :, 0].isfinite().all()):
        raise original_overflows(model.dtype)
    quality, *rest = [quality_of(each, length - 1, sequences, probes, seeds) for each in sums]
    for other, found in zip(others, rest, strict=True):
        other.found.append(found)
    return quality


def _weights(own: nn.Parameter, others: Sequence[Tensor | None]) -> list[nn.Parameter]:
    """The head's own weight and those in its place; the same tensor is the same parameter."""
    frozen = {id(other): _frozen(other.to(own.device)) for other in others if other is not None}
    return [own, *(own if other is None else frozen[id(other)] for other in others)]


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _token_sums(original: Tensor, others: Sequence[Tensor], labels: Tensor) -> Tensor:
    """-log p(x), -log q(x), KL and agreement, each summed over tokens, for every q; logits (tokens, vocabulary).

    fp64 (others, 4), on the host.
    """
    sums = torch.zeros(len(others), 4, dtype=torch.float64, device=original.device)
    rows = len(labels) if original.is_cuda else max(1, CACHED_LOGITS * torch.get_num_threads() // original.shape[-1])
    for part in (slice(start, start + rows) for start in range(0, len(labels), rows)):
        p, index = original[part].float().log_softmax(-1), labels[part].unsqueeze(-1)
        shares, best = p.exp(), largest(p)
        for number, logits in enumerate(others):
            q = logits[part].float().log_softmax(-1)
            divergence, agreement = torch.linalg.vecdot(shares, p - q), best == largest(q)
            each = (-p.gather(-1, index), -q.gather(-1, index), divergence, agreement)
            sums[number] += torch.stack([token.double().sum() for token in each])
    return sums.cpu()


def largest(rows: Tensor) -> Tensor:
    """`argmax` over the last dimension, the first among equals; by parts on a CPU, where maxima are far quicker."""
    if rows.is_cuda or rows.shape[-1] % PART:
        return rows.argmax(-1)
    parts = rows.view(*rows.shape[:-1], -1, PART)
    part = parts.amax(-1).argmax(-1, keepdim=True)
    inside = parts.take_along_dim(part.unsqueeze(-1), -2).squeeze(-2).argmax(-1, keepdim=True)
    return (part * PART + inside).squeeze(-1)
