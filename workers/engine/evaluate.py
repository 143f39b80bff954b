"""Closeness of the quantized model to the original: perplexity, KL divergence and top-1 agreement.

With p the original's and q the quantized model's distribution of the next token x_{t+1}, over all T tokens that have a
token before them in their sequence:

    perplexity = exp(-1/T sum log q(x_{t+1}))       KL = 1/T sum_t sum_v p(v) (log p(v) - log q(v))
    top-1 agreement = 1/T sum [argmax p = argmax q]

Activations of both are there when the last block is done; logits are made for some tokens at a time and dropped.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitwright.errors import NumericalFailure
from bitwright.events import Stage
from bitwright.report import Figures, Quality
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.engine.finetune.stage import Finetuned
from workers.engine.job import Job
from workers.engine.memory import LOGITS_AT_ONCE
from workers.engine.model.overflow import ALSO_DTYPE, original_overflows
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.outer_matrices import plain_head
from workers.engine.quantize.stage import Quantized
from workers.engine.shipped import Replay, evaluated_key, shipments_of
from workers.engine.shipped_quality import Evaluated, QualityMeter, differences, evaluate
from workers.engine.text.sequences import Sequences


def run(job: Job, quantized: Quantized, finetuned: Finetuned | None) -> Evaluated | None:
    """Measures everything that ships, with the numbers that the export stores; None without evaluation text.

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    job.clock.enter(Stage.EVALUATE)
    activations, sequences = quantized.evaluation, job.texts.evaluation
    if activations is None or sequences is None:
        return None

    def measured(head: Tensor | None, number: int, count: int) -> Quality:
        def tick(share: float) -> None:
            total = len(sequences.ids) * count
            job.reporter.progress(Stage.EVALUATE, (number + share) / count * total, total, "sequences")

        return measure(
            job.model,
            activations.original,
            activations.quantized,
            sequences,
            quantized_head=head,
            tick=tick,
            processes=job.processes,
        )

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
    return replace(evaluated, reference=_reference(job, activations, sequences, quantized.head))


def _reference(job: Job, activations: Activations, sequences: Sequences, head: Tensor | None) -> Figures | None:
    """The row of round to nearest.

    head   the job's: embeddings and a head that is tied to them are rounded to nearest in every job
    """
    if activations.reference is None:
        return None
    if head is not None and job.model.layout.head in job.schemes:
        head = plain_head(job)
    quality = measure(
        job.model,
        activations.original,
        activations.reference,
        sequences,
        quantized_head=head,
        tick=lambda _: None,
        processes=job.processes,
    )
    job.reporter.metric("perplexity_round_to_nearest", quality.perplexity)
    return Figures.of(quality)


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
) -> Quality:
    """Quality on `sequences`, whose hidden states after the last block are given, each (sequences, length, width).

    quantized_head  dequantized weight of the head where that is quantized too
    processes       those that measure together; the hidden states are of this one's share of the sequences

    Raises:
        NumericalFailure: the original or the quantized model's output is not finite.
    """
    head = model.model.get_submodule(model.layout.head)
    sums = torch.zeros(4, dtype=torch.float64)
    step = max(1, LOGITS_AT_ONCE[model.device.type] // model.vocabulary)
    ids = processes.share(sequences.ids)
    count, length = ids.shape
    with model.loaded(*model.after_blocks):
        weights = [head.weight, head.weight if quantized_head is None else _frozen(quantized_head.to(model.device))]
        for row in range(count):
            for start in range(0, length - 1, step):
                positions = slice(start, min(start + step, length - 1))
                logits = []
                for states, weight in zip((original, quantized), weights, strict=True):
                    head.weight = weight
                    logits.append(model.logits(states[row : row + 1, positions].to(model.device))[0])
                labels = ids[row, positions.start + 1 : positions.stop + 1].to(model.device)
                sums += _token_sums(logits[0], logits[1], labels).cpu()
            tick((row + 1) / count)
        head.weight = weights[0]
    processes.sum_(sums)
    if not math.isfinite(sums[0]):
        raise original_overflows(model.dtype)
    return _quality(sums, len(sequences.ids) * (length - 1), sequences)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _token_sums(original: Tensor, quantized: Tensor, labels: Tensor) -> Tensor:
    """-log p(x), -log q(x), KL and agreement, each summed over tokens; logits (tokens, vocabulary). fp64 (4,)."""
    p, q = original.float().log_softmax(-1), quantized.float().log_softmax(-1)
    index = labels.unsqueeze(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    agreement = p.argmax(-1) == q.argmax(-1)
    rows = (-p.gather(-1, index), -q.gather(-1, index), divergence, agreement)
    return torch.stack([row.double().sum() for row in rows])


def _quality(sums: Tensor, tokens: int, sequences: Sequences) -> Quality:
    original, quantized, divergence, agreement = (sums / tokens).tolist()
    if not all(map(math.isfinite, (original, quantized, divergence))):
        raise NumericalFailure(
            f"on the evaluation text the loss is {original} before and {quantized} after quantization",
            field="quantization",
            hint="use more bits or smaller groups" + ALSO_DTYPE,
        )
    return Quality(
        text=sequences.report(),
        perplexity_original=_exp(original),
        perplexity=_exp(quantized),
        kl_divergence=max(0.0, divergence),
        top1_agreement=agreement,
    )


def _exp(nats: float) -> float:
    """exp, limited to what JSON can hold."""
    return math.exp(min(nats, 700.0))
