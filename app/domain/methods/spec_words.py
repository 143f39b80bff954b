"""A few words for what a request asks of the weights' size, for reports and for the files themselves."""

from app.domain.methods.any_method import WeightSpec
from app.domain.methods.goals import AtMost, Fits
from app.domain.methods.schemes import PER_CHANNEL
from app.domain.methods.sizes import in_words as size_in_words

CHOSEN = "chosen for each"


def in_words(spec: WeightSpec) -> str:
    """A scheme's or a mix's name, numbers of integers, or what the linears' schemes are chosen for."""
    budget, goal, mix = spec.budget(), spec.goal(), spec.mix()
    if budget is not None:
        return f"{CHOSEN}: {budget.average:g} bits a weight over the {budget.over}"
    if isinstance(goal, AtMost):
        limit = f"{goal.kl:g} nats of divergence" if goal.bytes is None else size_in_words(goal.bytes)
        return f"{CHOSEN}: at most {limit}"
    if isinstance(goal, Fits):
        return f"{CHOSEN}: fits {size_in_words(goal.memory)}"
    if mix is not None:
        return mix.value
    scheme = spec.schemes()[0][1]
    if scheme.name is not None:
        return scheme.name.value
    groups = "rows" if scheme.group_size == PER_CHANNEL else f"groups of {scheme.group_size}"
    return f"{scheme.bits} bits, {groups}, {'symmetric' if scheme.symmetric else 'asymmetric'}"
