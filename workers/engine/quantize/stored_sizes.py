"""Bytes that a model's checkpoint stores of everything whose scheme is not chosen, and its number of parameters."""

from math import prod

from app.domain.methods import Candidate, WeightSpec
from workers.engine.model.checkpoint import StoredTensor
from workers.engine.model.streamed_model import StreamedModel


def kept_bytes(model: StreamedModel, spec: WeightSpec, scale_bits: int) -> int:
    """Of parameters of the model, each once, without the blocks' quantized linears; a head as it is stored."""
    names = [name for name in model.linears() if spec.scheme_of(name) is not None]
    kept = sum(tensor.size for tensor in _tensors(model))
    kept -= sum(model.names.stored_bytes(f"{name}.weight") for name in names)
    return kept + head_bytes(model, spec, scale_bits)


def head_bytes(model: StreamedModel, spec: WeightSpec, scale_bits: int) -> int:
    """Of the quantized head, whose scheme nothing chooses; 0 where it stays as it is."""
    head = model.layout.head
    scheme = spec.scheme_of(head)
    if scheme is None:
        return 0
    linear = model.linears()[head]
    return Candidate(scheme).stored_bits((linear.out_features, linear.in_features), scale_bits) // 8


def parameters(model: StreamedModel) -> int:
    """Number of the model's parameters, shared ones once."""
    return sum(prod(tensor.shape) for tensor in _tensors(model))


def _tensors(model: StreamedModel) -> list[StoredTensor]:
    """Tensors of the checkpoint that are parameters of the model, each once.

    Never the modules: stages put others in their place, and parameters without memory.
    """
    stored = {name for parameter in model.names.parameters for name in model.names.stored_names(parameter)}
    return [model.checkpoint.tensors[name] for name in sorted(stored)]
