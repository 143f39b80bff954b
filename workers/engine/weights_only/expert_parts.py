"""Places of experts' linears in a 3-D tensor, as views of it and as a checkpoint describes them."""

from torch import Tensor

from app.domain.weight_targets import ExpertPlace, KeptPart, Target
from workers.formats.stored_linear import StoredPart


def outputs_of(expert: Tensor, place: ExpertPlace, count: int) -> Tensor:
    """A linear's part (out, in) of an expert's matrix, in its memory."""
    outputs = expert.T if place.transposed else expert
    return outputs[place.first : place.first + place.step * count : place.step]


def stored_part(part: Target | KeptPart, place: ExpertPlace) -> StoredPart:
    """The description of the same place."""
    stop = place.first + place.step * part.shape[0]
    rows = (place.first, stop, place.step)
    return StoredPart(of=part.tensor, index=place.expert, rows=rows, transposed=place.transposed)
