"""Goals and budgets that no choice of schemes can reach, by sizes alone: told before anything is computed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from app.domain.formats import ExportFormat
from app.domain.goals.kv_cache import CACHE_BYTES, FP8_CACHE_BYTES, cache_bytes
from app.domain.goals.stored_size import header_bytes, outer_bits, stored_bits
from app.domain.inputs.architectures import EMBEDDINGS, HEAD, Dimensions
from app.domain.inputs.inspection import Inspection
from app.domain.methods import SCALE_BITS, AtMost, Candidate, Fits, WeightSpec
from app.domain.methods.goals import RESERVE
from app.domain.methods.module_rules import over_budget, unties
from app.domain.methods.sizes import in_words
from app.domain.request.job_request import JobRequest
from bitwright.errors import BitwrightError, GoalOutOfReach, InvalidRequest
from bitwright.frontier import FrontierPoint

Config = Mapping[str, object]


def cache_of(spec: WeightSpec, config: Config) -> int | None:
    """Bytes of the KV cache that a goal leaves room for; None where it is about none.

    Raises:
        InvalidRequest: the cache's size is not known.
    """
    goal = spec.goal()
    value_bytes = CACHE_BYTES if spec.kv_cache is None else FP8_CACHE_BYTES
    return cache_bytes(config, goal.context, goal.sequences, value_bytes) if isinstance(goal, Fits) else None


def byte_limit(spec: WeightSpec, config: Config) -> int | None:
    """Bytes that weight files may take; None where the goal is no size.

    Raises:
        InvalidRequest: the cache's size is not known, or it alone takes more than the memory.
    """
    goal, cache = spec.goal(), cache_of(spec, config)
    if isinstance(goal, AtMost):
        return goal.bytes
    if not isinstance(goal, Fits) or cache is None:
        return None
    limit = int(goal.memory / RESERVE) - cache
    if limit <= 0:
        raise InvalidRequest(
            f"the KV cache of {goal.sequences} x {goal.context} tokens takes {in_words(cache)}, with a tenth besides "
            f"more than {in_words(goal.memory)}",
            field="quantization.fits",
            value=goal.memory,
            hint="ask for a shorter context, fewer sequences or more memory",
        )
    return limit


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model before anything is chosen, in bytes of weight files.

    kept      of all that is not chosen: embeddings, head, norms, headers
    choices   of each linear, by full name: bits of each of its candidates
    weights   number of weights of the linears
    """

    kept: int
    choices: Mapping[str, tuple[int, ...]]
    weights: int

    @property
    def least(self) -> int:
        """Of the smallest result."""
        return self.kept + sum(map(min, self.choices.values())) // 8


def reach_errors(request: JobRequest, inspection: Inspection, dimensions: Dimensions) -> list[BitwrightError]:
    """The error of a goal, or of a budget over the model, that cannot be reached; [] where that is not known yet."""
    spec, budget = request.quantization, request.quantization.budget()
    over_model = budget is not None and budget.over == "model"
    if request.base_job is not None or not (spec.goal() is not None or over_model):
        return []
    try:
        limit = byte_limit(spec, inspection.config)
    except InvalidRequest as error:
        return [error]
    sizes = _sizes(spec, None if over_model else request.formats, inspection, dimensions)
    if budget is not None and over_model:
        least = 8 * sizes.least / max(1, inspection.weights)
        return [over_budget(budget.average, least, "model")] if budget.average < least else []
    if limit is not None and limit < sizes.least:
        return [too_small(spec, limit, sizes.kept, sizes.least)]
    return []


def _sizes(
    spec: WeightSpec, formats: tuple[ExportFormat, ...] | None, inspection: Inspection, dimensions: Dimensions
) -> Sizes:
    """By configuration and headers; where names of linears are not exact, as if all of them could be dropped.

    formats   None: codes and scales alone count, as for a budget
    """

    def bits(choice: Candidate, shape: tuple[int, int]) -> int:
        return choice.stored_bits(shape) if formats is None else stored_bits(formats, choice, shape, SCALE_BITS)

    shapes = dimensions.linears()
    each = inspection.tensor_bytes / max(1, inspection.weights)
    choices: dict[str, tuple[int, ...]] = {}
    weights = 0
    for name, shape in shapes.items():
        candidates = spec.candidates(name, shape[1])
        if dimensions.exact and candidates:
            choices[name] = tuple(bits(candidate, shape) for candidate in candidates)
        if candidates or not dimensions.exact:
            weights += math.prod(shape)
    kept = inspection.tensor_bytes - int(weights * each)
    embeddings, head, tied = spec.embeddings_scheme(), spec.head_scheme(), dimensions.tied_embeddings
    shape = (dimensions.vocabulary, dimensions.hidden)
    dense, bits_of = int(math.prod(shape) * each), partial(outer_bits, formats, shape=shape, scale_bits=SCALE_BITS)
    chosen = spec.embeddings_candidates(dimensions.hidden)
    if embeddings is not None:
        kept += (0 if chosen else bits_of(embeddings, tied=tied) // 8) - dense
    if chosen:
        choices[EMBEDDINGS] = tuple(bits_of(choice.scheme, tied=tied) for choice in chosen)
    if head is not None and (not tied or unties(spec)):
        of_head = spec.head_candidates(dimensions.hidden)
        kept += (0 if of_head else bits_of(head, tied=False) // 8) - (0 if tied else dense)
        choices |= {HEAD: tuple(bits_of(choice.scheme, tied=False) for choice in of_head)} if of_head else {}
    headers = header_bytes(choices, ()) if dimensions.exact and formats is not None else 0
    return Sizes(max(0, kept) + headers, choices, weights)


def too_small(
    spec: WeightSpec, limit: int, kept: int, least: int, frontier: tuple[FrontierPoint, ...] = ()
) -> GoalOutOfReach:
    """The error of a size that not even the smallest choices meet.

    kept    bytes of what is not chosen
    least   bytes of the smallest result
    """
    if limit < kept:
        detail = f"what stays as it is (embeddings, head, norms) takes {in_words(kept)}, more than {in_words(limit)}"
    else:
        detail = f"the smallest choices take {in_words(least)}, {in_words(kept)} of it in what stays as it is; "
        detail += f"more than {in_words(limit)}"
    return GoalOutOfReach(
        detail,
        field=f"quantization.{spec.field_of_choices()}",
        value=limit,
        hint=f"allow at least {least} bytes, or smaller choices",
        frontier=frontier,
    )
