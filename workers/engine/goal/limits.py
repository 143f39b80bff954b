"""The limits that a goal sets, in the terms of the frontier: distance, or bits of the linears that are chosen."""

from dataclasses import dataclass

from app.domain.formats import ExportFormat
from app.domain.goals.reach import byte_limit, cache_of
from app.domain.goals.stored_size import header_bytes
from app.domain.methods import AtMost, Candidate
from workers.engine.goal.search import margin
from workers.engine.job import Job
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.candidates import candidates_of, costs_of, shapes_of
from workers.engine.quantize.stored_sizes import outer_bytes
from workers.formats.gguf.sizes import PackedLinear, bytes_beside


@dataclass(frozen=True)
class Limits:
    """A goal and the sizes that it is held against.

    kl           None where the goal is a size
    weights      bytes that the weight files may take; 0 where the goal is a distance
    kept         bytes of the weight files besides the linears that are chosen, at the most
    candidates   of every such linear, by full name
    costs        their bits, the most of all packed formats
    cache        bytes that are left to the KV cache
    weights_chosen   number of weights of those linears
    margin       by which a point must keep the distance on the text that decides
    """

    kl: float | None
    weights: int
    kept: int
    candidates: dict[str, tuple[Candidate, ...]]
    costs: dict[str, list[int]]
    cache: int | None = None
    weights_chosen: int = 0
    margin: float = 1.0

    @property
    def holds(self) -> float:
        """The distance that a point must keep on the text that decides."""
        return (self.kl or 0.0) / self.margin

    @property
    def bits(self) -> int | None:
        """Bits that the chosen linears may take; None where the goal is a distance."""
        return None if self.kl is not None else 8 * (self.weights - self.kept)


def limits_of(job: Job, held_out: int) -> Limits:
    """The limits of a job's goal.

    held_out   tokens of the text that decides

    Raises:
        InvalidRequest: the size of the KV cache is not known, or too much.
    """
    goal, model, scale_bits = job.spec.goal(), job.model, job.plan.scale_dtype.itemsize * 8
    candidates = candidates_of(model, job.spec)
    shapes, costs = shapes_of(model, candidates), costs_of(model, candidates, job.request.formats, scale_bits)
    is_distance = isinstance(goal, AtMost) and goal.kl is not None
    return Limits(
        kl=goal.kl if isinstance(goal, AtMost) else None,
        weights=0 if is_distance else byte_limit(job.spec, model.checkpoint.config) or 0,
        kept=_kept(job, tuple(candidates), scale_bits),
        candidates=candidates,
        costs=costs,
        cache=cache_of(job.spec, model.checkpoint.config),
        weights_chosen=sum(out * width for out, width in shapes.values()),
        margin=margin(held_out),
    )


def _kept(job: Job, chosen: tuple[str, ...], scale_bits: int) -> int:
    """All tensors of the checkpoint less those that are quantized, quantized embeddings and head, and headers."""
    model, tensors = job.model, job.model.checkpoint.tensors
    quantized = sum(model.names.stored_bytes(f"{name}.weight") for name in job.schemes)
    formats = job.request.formats
    kept = []
    if set(formats) != {ExportFormat.GGUF}:
        kept.append(sum(tensor.size for tensor in tensors.values()) - quantized + header_bytes(chosen, tensors))
    if ExportFormat.GGUF in formats:
        kept.append(beside_blocks(job))
    return max(kept) + outer_bytes(model, job.schemes, chosen, formats, scale_bits)


def beside_blocks(job: Job) -> int:
    """Of a GGUF file, with its tokenizer: all but the blocks of quantized linears."""
    model, names = job.model, job.model.names
    linears = [
        PackedLinear(names.linear_name(name), tuple(names.stored_names(f"{name}.weight")), shape)
        for name in job.schemes
        for shape in [_shape(model, name)]
    ]
    taken = {stored for linear in linears for stored in linear.tensors}
    beside = {}
    for parameter in names.slices:
        name = parameter.removesuffix(".weight")
        if name != parameter and name not in job.schemes and taken.intersection(names.stored_names(parameter)):
            beside[names.linear_name(name)] = _shape(model, name)
    return bytes_beside(model.checkpoint, linears, beside)


def _shape(model: StreamedModel, name: str) -> tuple[int, int]:
    rows, columns = model.model.get_submodule(name).get_parameter("weight").shape
    return rows, columns
