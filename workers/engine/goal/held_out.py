"""Held-out calibration text: its distance through rounded blocks, and through what the method made."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.request.goal_problems import LEAST_SAMPLES
from bitwright.errors import NumericalFailure
from workers.engine.evaluate import measure
from workers.engine.job import Job
from workers.engine.job_texts import Texts
from workers.engine.quantize.activations import Activations
from workers.engine.quantize.block_reader import replay_quantized
from workers.engine.quantize.reference import rounded
from workers.engine.text.sequences import Sequences
from workers.methods.rtn import round_to_scheme

HELD_OUT_TOKENS = 8192
"""Tokens that decide, where the calibration text has them to spare: a quarter of its sequences at the most."""
WORST = 1e6
"""KL of a model whose outputs are no numbers."""


def split(texts: Texts) -> tuple[Texts, Sequences | None]:
    """The texts with fewer calibration sequences, and those that are held out; None where there are too few."""
    calibration = texts.calibration
    if calibration is None or len(calibration.ids) < LEAST_SAMPLES:
        return texts, None
    count, length = calibration.ids.shape
    held = min(math.ceil(HELD_OUT_TOKENS / length), count // LEAST_SAMPLES)
    rest = replace(calibration, ids=calibration.ids[:-held].clone())
    return replace(texts, calibration=rest), replace(calibration, ids=calibration.ids[-held:].clone())


@dataclass(frozen=True)
class HeldOut:
    """Activations of the held-out sequences: those of the original model are after the last block."""

    sequences: Sequences
    activations: Activations

    @classmethod
    def through(cls, job: Job, sequences: Sequences) -> "HeldOut":
        """This process's share of the sequences, through the original blocks."""
        model = job.model
        with model.loaded(*model.layout.outer):
            activations = Activations(model, job.processes.share(sequences.ids), job.plan, keep_inputs=False)
        for index in range(len(model.blocks)):
            with model.loaded(model.layout.block(index)):
                activations.advance_original(index, model.blocks[index])
        return cls(sequences, activations)

    def rounded(self, job: Job, schemes: dict[str, Scheme]) -> float:
        """KL of the model with these schemes' linears rounded to nearest, nats a token."""
        model = job.model
        self.activations.rewind(model)
        for index in range(len(model.blocks)):
            prefix = model.layout.block(index)
            linears = model.block_linears(index)
            own = {name: schemes[f"{prefix}.{name}"] for name in linears if f"{prefix}.{name}" in schemes}
            with model.loaded(prefix), rounded(model.block_linears(index), own, job.plan.scale_dtype):
                self.activations.advance_quantized(index, model.blocks[index])
        return self._distance(job, _rounded_head(job))

    def made(self, job: Job, head: Tensor | None) -> float:
        """KL of the job's finished blocks and its head, nats a token."""
        replay_quantized(job.model, job.finished_blocks, self.activations)
        return self._distance(job, head)

    def _distance(self, job: Job, head: Tensor | None) -> float:
        try:
            quality = measure(
                job.model,
                self.activations.original,
                self.activations.quantized,
                self.sequences,
                quantized_head=head,
                tick=lambda _: None,
                processes=job.processes,
            )
        except NumericalFailure:
            if not bool(self.activations.original.isfinite().all()):
                raise
            return WORST
        return min(quality.kl_divergence, WORST)


@torch.no_grad()
def _rounded_head(job: Job) -> Tensor | None:
    head, model = job.model.layout.head, job.model
    scheme = job.schemes.get(head)
    if scheme is None:
        return None
    with model.loaded(head):
        weight = model.linears()[head].weight
        return round_to_scheme(weight, scheme, job.plan.scale_dtype).dequantize()
