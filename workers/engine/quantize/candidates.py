"""Choices of a budget or a goal: of linears of the blocks, embeddings and head, each with the ways to store it.

A matrix that is embeddings and head at once goes by the name of the embeddings, as in the schemes of a job. Runtimes
that join linears take one width for those; llama.cpp multiplies each by itself, so that in a GGUF file everyone has its
own type, but for the experts of a block, which are one tensor in it.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from app.domain.formats import ExportFormat
from app.domain.goals.stored_size import outer_bits, stored_bits
from app.domain.methods import Candidate, WeightSpec
from app.domain.request.goal_problems import sized_formats
from workers.engine.model.streamed_model import StreamedModel

EXPERT = re.compile(r"\.experts\.\d+\.")
Shapes = Mapping[str, tuple[int, int]]


def candidates_of(model: StreamedModel, spec: WeightSpec) -> dict[str, tuple[Candidate, ...]]:
    """Of everything that is chosen for, by full name: quantized linears of the blocks, then head and embeddings."""
    linears, head = model.linears(), model.layout.head
    found = {n: spec.candidates(n, m.in_features) for n, m in linears.items() if n != head}
    if not model.tied:
        found[head] = spec.head_candidates(linears[head].in_features)
    found[model.layout.embeddings] = spec.embeddings_candidates(model.embedding_width)
    return {name: choices for name, choices in found.items() if choices}


def shapes_of(model: StreamedModel, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of linears and of the embeddings, by full name."""
    linears, embeddings = model.linears(), (model.known_tokens, model.embedding_width)
    return {
        name: (linears[name].out_features, linears[name].in_features) if name in linears else embeddings
        for name in names
    }


def costs_of(
    model: StreamedModel,
    candidates: Mapping[str, tuple[Candidate, ...]],
    formats: Collection[ExportFormat] | None,
    scale_bits: int,
) -> dict[str, list[int]]:
    """Bits of each choice, by full name.

    formats   the most that any packed one of them takes; None: codes and scales alone, as for a budget
    """
    outer = {model.layout.head, model.layout.embeddings}

    def bits(name: str, choice: Candidate, shape: tuple[int, int]) -> int:
        if name in outer:
            twice = model.tied and name == model.layout.embeddings
            return outer_bits(formats, choice.scheme, shape, scale_bits, tied=twice)
        return (
            choice.stored_bits(shape, scale_bits)
            if formats is None
            else stored_bits(formats, choice, shape, scale_bits)
        )

    shapes = shapes_of(model, candidates)
    return {name: [bits(name, choice, shapes[name]) for choice in choices] for name, choices in candidates.items()}


def joined_choices(
    model: StreamedModel, formats: Collection[ExportFormat], names: Iterable[str]
) -> list[tuple[str, ...]]:
    """Full names of linears that get one choice together."""
    packed = {name for name in sized_formats(formats) if not name.info.always_kept}
    if packed != {ExportFormat.GGUF}:
        return model.input_groups()
    experts: dict[str, list[str]] = {}
    for name in names:
        if EXPERT.search(name):
            experts.setdefault(EXPERT.sub(".experts.", name), []).append(name)
    return [tuple(group) for group in experts.values()]
