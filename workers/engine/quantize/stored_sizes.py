"""Bytes that a model's checkpoint stores of everything whose scheme is not chosen, and its number of parameters."""

from collections.abc import Collection, Iterable, Mapping
from math import prod

from app.domain.formats import ExportFormat
from app.domain.goals.stored_size import outer_bits
from app.domain.methods import Scheme
from workers.engine.model.checkpoint import StoredTensor
from workers.engine.model.streamed_model import StreamedModel


def kept_bytes(model: StreamedModel, schemes: Mapping[str, Scheme], chosen: Collection[str], scale_bits: int) -> int:
    """Of parameters of the model, each once, without the blocks' quantized linears; quantized outer ones as such.

    schemes   of everything that is quantized, by full name
    chosen    names of those that are chosen for, which are not counted
    """
    kept = sum(tensor.size for tensor in _tensors(model))
    kept -= sum(model.names.stored_bytes(f"{name}.weight") for name in schemes)
    return kept + outer_bytes(model, schemes, chosen, None, scale_bits)


def outer_bytes(
    model: StreamedModel,
    schemes: Mapping[str, Scheme],
    chosen: Collection[str],
    formats: Iterable[ExportFormat] | None,
    scale_bits: int,
) -> int:
    """Of quantized embeddings and a quantized head, whose schemes nothing chooses; 0 where they stay as they are.

    formats   None: codes and scales alone count
    """
    bits = 0
    for name in ({model.layout.embeddings, model.layout.head} & schemes.keys()) - set(chosen):
        rows, columns = model.model.get_submodule(name).weight.shape
        twice = model.tied and name == model.layout.embeddings
        bits += outer_bits(formats, schemes[name], (rows, columns), scale_bits, tied=twice)
    return -(-bits // 8)


def parameters(model: StreamedModel) -> int:
    """Number of the model's parameters, shared ones once, and so is a head that is untied for its scheme."""
    return sum(prod(tensor.shape) for tensor in _tensors(model) if tensor.copies is None)


def _tensors(model: StreamedModel) -> list[StoredTensor]:
    """Tensors of the checkpoint that are parameters of the model, each once.

    Never the modules: stages put others in their place, and parameters without memory.
    """
    stored = {name for parameter in model.names.parameters for name in model.names.stored_names(parameter)}
    return [model.checkpoint.tensors[name] for name in sorted(stored)]
