"""The reference row of a report: what round to nearest makes of the job's schemes, on the job's evaluation text.

The evaluation text goes through every block once more, with its linears rounded to nearest in place of its weights;
`Activations` has their hidden states. That happens before the method sees the block, and leaves the block as it was, so
that no code depends on whether there is a reference. `app.domain.workload` decides that.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from torch import Tensor, dtype, nn

from app.domain.methods import Scheme
from workers.methods.rtn import round_to_scheme
from workers.numerics.floats.joined import joined_amax


@contextmanager
def rounded(
    linears: Mapping[str, nn.Linear],
    schemes: Mapping[str, Scheme],
    scale_dtype: dtype,
    joined: Sequence[tuple[str, ...]] = (),
    *,
    search: bool = True,
    moments: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[None]:
    """The linears that have a scheme, by name, with their weights rounded to nearest; as they were afterwards.

    joined   those that a runtime joins (`workers.numerics.floats.joined`)
    search   whether scales of FP4 and MX are searched
    moments  second moments of inputs that weigh the search of llama.cpp's types
    """
    kept = {name: linears[name].weight for name in schemes}
    amax = joined_amax(joined, schemes, kept)
    try:
        for name, scheme in schemes.items():
            made = round_to_scheme(
                kept[name], scheme, scale_dtype, amax.get(name), search=search, moments=moments.get(name)
            )
            linears[name].weight = nn.Parameter(made.dequantize(), requires_grad=False)
        yield
    finally:
        for name, weight in kept.items():
            linears[name].weight = weight
