"""The folders that together are the result of a job: one checkpoint, or a base and the adapter that belongs to it."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from bitwright.formats import ADAPTER_FOLDER, ADAPTERS_ALONE, NATIVE, PEFT, first_choice

STOCK_PEFT_ADAPTERS = frozenset({"lora", "bayesian-lora"})
"""Kinds of adapters whose factors are a LoRA that stock peft loads."""


def delivery(kept: Sequence[str], request: object) -> tuple[str, ...]:
    """Names of the folders, among those that a job keeps, that its result needs; the model comes first.

    kept      formats, and `adapter` of a job that trains; at least one
    request   of the job, as it is or as another version stored it

    With `peft` among the formats the others hold the base alone. An adapter that stock peft does not load and that
    was not merged is in its own file alone. The base without it is not what the report measured.
    """
    models = [name for name in kept if name not in ADAPTERS_ALONE]
    asked = [name for name in kept if name not in {NATIVE, ADAPTER_FOLDER}]
    if not models or asked == [PEFT]:
        return (first_choice(kept),)
    model = first_choice(models)
    if PEFT in kept:
        return model, PEFT
    apart = ADAPTER_FOLDER in kept and _stays_apart(request)
    return (model, ADAPTER_FOLDER) if apart else (model,)


def _stays_apart(request: object) -> bool:
    """True if no checkpoint has the trained adapter, neither merged nor as factors beside the weights."""
    fields = request.model_dump() if isinstance(request, BaseModel) else request
    if not isinstance(fields, Mapping) or fields.get("merge") is not None:
        return False
    adapter = fields.get("adapter")
    return not isinstance(adapter, Mapping) or adapter.get("kind") not in STOCK_PEFT_ADAPTERS
