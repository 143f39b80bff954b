"""Which folders of a job are its result together: one checkpoint, or a base and the adapter that belongs to it."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from bitwright.formats import ADAPTER_FOLDER, ExportFormat, first_choice

ADAPTERS_ALONE = frozenset({ExportFormat.PEFT.value, ADAPTER_FOLDER})
"""Folders that are no model without their base."""
STOCK_PEFT_ADAPTERS = frozenset({"lora", "bayesian-lora"})
"""Kinds of adapters whose factors are a LoRA that stock peft loads."""


def delivery(kept: Sequence[str], request: object) -> tuple[str, ...]:
    """Of what a job keeps, the names of the folders that its result needs; the model comes first.

    kept      formats, and `adapter` of a job that trains; at least one
    request   of the job, as it is or as another version stored it

    With `peft` among the formats the others hold the base alone. An adapter that is none of peft's and was not merged
    is in its own file alone. The base without it is not what the report measured.
    """
    models = [name for name in kept if name not in ADAPTERS_ALONE]
    asked = [name for name in kept if name not in {ExportFormat.NATIVE, ADAPTER_FOLDER}]
    if not models or asked == [ExportFormat.PEFT.value]:
        return (first_choice(kept),)
    model = first_choice(models)
    if ExportFormat.PEFT.value in kept:
        return model, ExportFormat.PEFT.value
    apart = ADAPTER_FOLDER in kept and _stays_apart(request)
    return (model, ADAPTER_FOLDER) if apart else (model,)


def _stays_apart(request: object) -> bool:
    """Whether the trained adapter is in no checkpoint: neither merged, nor factors that a checkpoint has beside it."""
    fields = request.model_dump() if isinstance(request, BaseModel) else request
    if not isinstance(fields, Mapping) or fields.get("merge") is not None:
        return False
    adapter = fields.get("adapter")
    return not isinstance(adapter, Mapping) or adapter.get("kind") not in STOCK_PEFT_ADAPTERS
