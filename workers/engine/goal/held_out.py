"""Held-out calibration text: its distance through rounded blocks, and through what the method made.

Quantized embeddings and head, inputs and caches that a server rounds are in both. Rounded blocks have numbers of inputs
and caches by the held-out text, and so have llama.cpp's types the weights of their columns; those that are made have
them by the calibration text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor, nn

from app.domain.methods import Candidate, Scheme
from app.domain.request.goal_problems import LEAST_SAMPLES
from bitwright.errors import NumericalFailure
from workers.contracts.kv_cache import KVScales
from workers.engine.evaluate import measure
from workers.engine.job import Job
from workers.engine.job_texts import Texts
from workers.engine.quantize.activations import Activations, second_moments, sum_moments
from workers.engine.quantize.block_reader import replay_quantized
from workers.engine.quantize.cache_states import CacheWatch
from workers.engine.quantize.outer_matrices import plain_embeddings, plain_head, substitutes
from workers.engine.quantize.reference import rounded
from workers.engine.quantize.serving import InputMaxima, Served, cache_scales, set_amax
from workers.engine.text.sequences import Sequences
from workers.numerics.floats.input_rounding import input_roundings

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
    """Activations of the held-out sequences: those of the original model are after the last block.

    outer   embeddings and head of the point that was rounded last
    inputs  by block: largest magnitude of the inputs' columns of the linears that may get a calibrated scheme
    caches  by block: scales of its cache, where the request asks for them
    moments by block: second moments of the inputs of linears that may get one of llama.cpp's types
    """

    sequences: Sequences
    activations: Activations
    outer: "_Outer"
    inputs: tuple[Mapping[str, Tensor], ...]
    caches: tuple[KVScales | None, ...]
    moments: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def through(
        cls, job: Job, sequences: Sequences, candidates: Mapping[str, Sequence[Candidate]] = MappingProxyType({})
    ) -> "HeldOut":
        """This process's share of the sequences, through the original blocks.

        candidates   of every linear that is chosen, by full name
        """
        model, inputs, caches = job.model, list[Mapping[str, Tensor]](), list[KVScales | None]()
        moments = list[Mapping[str, Tensor]]()
        with model.loaded(*model.layout.outer):
            activations = Activations(model, job.processes.share(sequences.ids), job.plan, keep_inputs=False)
        for index in range(len(model.blocks)):
            prefix = model.layout.block(index)
            with model.loaded(prefix):
                watched = InputMaxima(_calibrated(model.block_linears(index), prefix, candidates))
                cache = None if job.spec.kv_cache is None else CacheWatch()
                weighed = _weighed(model.block_linears(index), prefix, candidates)
                with watched.watching(), second_moments(weighed) as squares:
                    activations.advance_original(index, model.blocks[index], cache)
                    sum_moments(job.processes, squares, weighed)
                moments.append(squares)
                inputs.append(watched.columns(job.processes))
                caches.append(None if cache is None else cache_scales(cache, job.processes, model.device))
        return cls(sequences, activations, _Outer(), tuple(inputs), tuple(caches), tuple(moments))

    def rounded(self, job: Job, schemes: dict[str, Scheme]) -> float:
        """KL of the model with these schemes' linears rounded to nearest, nats a token."""
        model = job.model
        embeddings, head = self.outer.of(job)
        self._begin(job, embeddings)
        for index in range(len(model.blocks)):
            prefix, joined = model.layout.block(index), model.joined(index)
            linears = model.block_linears(index)
            own = {name: schemes[f"{prefix}.{name}"] for name in linears if f"{prefix}.{name}" in schemes}
            columns = {name: each for name, each in self.inputs[index].items() if name in own}
            roundings = input_roundings(own, set_amax(columns, joined, own))
            self.activations.served[index] = Served(roundings, self.caches[index])
            search, moments = job.spec.rounds_to_searched_scales(), self.moments[index]
            with (
                model.loaded(prefix),
                rounded(model.block_linears(index), own, job.plan.scale_dtype, joined, search=search, moments=moments),
            ):
                self.activations.advance_quantized(index, model.blocks[index])
        return self._distance(job, head)

    def made(self, job: Job, head: Tensor | None) -> float:
        """KL of the job's finished blocks and its head, nats a token."""
        model, finished = job.model, job.finished_blocks
        for index in range(len(model.blocks)):
            prefix = model.layout.block(index)
            linears = {name.removeprefix(f"{prefix}."): each for name, each in finished.load(index).items()}
            cache = next(iter(finished.caches(index).values()), None)
            self.activations.served[index] = Served.of(linears, cache, model.device)
        self._begin(job, substitutes(model, finished))
        replay_quantized(model, finished, self.activations)
        return self._distance(job, head)

    def _begin(self, job: Job, embeddings: Mapping[str, Tensor]) -> None:
        """X_q <- these embeddings, or the model's own where there are none."""
        if embeddings:
            self.activations.substitute(job.model, embeddings)
        else:
            self.activations.rewind(job.model)

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


class _Outer:
    """Embeddings and head rounded by the weights alone, on the host: of the schemes that were asked for last."""

    def __init__(self) -> None:
        self._schemes: tuple[Scheme | None, ...] = ()
        self._made: tuple[dict[str, Tensor], Tensor | None] = ({}, None)

    def of(self, job: Job) -> tuple[dict[str, Tensor], Tensor | None]:
        """Replacement of the embedding matrix, by parameter, and the head's weight; none where they stay."""
        layout = job.model.layout
        schemes = (job.schemes.get(layout.embeddings), job.schemes.get(layout.head))
        if schemes != self._schemes:
            embeddings = plain_embeddings(job)
            head = plain_head(job) if layout.head in job.schemes else None
            self._schemes = schemes
            self._made = (embeddings, next(iter(embeddings.values()), None) if job.model.tied else head)
        return self._made


def _weighed(
    linears: Mapping[str, nn.Linear], prefix: str, candidates: Mapping[str, Sequence[Candidate]]
) -> dict[str, nn.Linear]:
    """Those of a block that may get one of llama.cpp's types."""
    return {
        name: linear
        for name, linear in linears.items()
        if any(choice.scheme.blocks is not None for choice in candidates.get(f"{prefix}.{name}", ()))
    }


def _calibrated(
    linears: Mapping[str, nn.Linear], prefix: str, candidates: Mapping[str, Sequence[Candidate]]
) -> dict[str, nn.Linear]:
    """Those of a block that may get a scheme with a number of their inputs."""
    return {
        name: linear
        for name, linear in linears.items()
        if any(c.scheme.row is not None and c.scheme.row.calibrated for c in candidates.get(f"{prefix}.{name}", ()))
    }
