"""Heads that are the embedding matrix in a model and stored apart in its results, and the bytes that this adds."""

from app.domain.formats import EmbeddingRule
from app.domain.inputs.inspection import Inspection
from app.domain.methods.module_rules import unties
from app.domain.request.job_request import JobRequest
from app.domain.sizes.files import Matrix
from app.domain.weight_targets import embeddings_tensor, has_head


def outer_shape(inspection: Inspection) -> tuple[int, int] | None:
    """Shape (vocabulary, width) of the matrix of embeddings; None where it is not known."""
    name = embeddings_tensor(inspection.tensors)
    if name is not None:
        rows, columns = inspection.tensors[name].shape
        return rows, columns
    dimensions = inspection.dimensions
    shape = None if dimensions is None else (dimensions.vocabulary, dimensions.hidden)
    return shape if shape is not None and all(shape) else None


def is_tied(inspection: Inspection) -> bool:
    """True if the head is the embedding matrix, as far as configuration and names tell."""
    if inspection.dimensions is not None:
        return inspection.dimensions.tied_embeddings
    return bool(inspection.tensors) and not has_head(inspection.tensors)


def untied_warnings(request: JobRequest, inspection: Inspection) -> list[str]:
    """The bytes that a head takes beside the embeddings that it is tied to in the model, for the caller."""
    spec, shape = request.quantization, outer_shape(inspection)
    if shape is None or not is_tied(inspection):
        return []
    head, embeddings = spec.head_scheme(), spec.embeddings_scheme()
    if unties(spec) and head is not None:
        more = Matrix(shape, head).native_bits / 8 / 1e6
        return [
            "quantization.modules.head: the model has one matrix for head and embeddings; the quantized head is stored "
            f"besides, {more:.1f} MB more, and tie_word_embeddings becomes false"
        ]
    if embeddings is None:
        return []
    more = Matrix(shape, embeddings).native_bits / 8 / 1e6
    return [
        f"formats.{index}: {name.value} stores the matrix of head and embeddings twice, {more:.1f} MB more: vLLM finds "
        "no head in quantized embeddings"
        for index, name in enumerate(request.formats)
        if name.info.embeddings is EmbeddingRule.UNIFORM
    ]
