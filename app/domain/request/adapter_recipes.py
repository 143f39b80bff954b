"""Shorthand methods that quantize a base and finetune an adapter on it, and what they stand for.

    {"model": M, "method": "qa-hira", "bits": 3, "rank": 8, "finetune": {"dataset": D}}
    {"model": M, "quantization": {"method": "rtn", "symmetric": false, "bits": 3},
     "adapter": {"kind": "qa-hira", "rank": 8}, "finetune": {"dataset": D}}

A recipe names the adapter and, where the request is silent, the base; in the full form any quantizer may be the base of
any adapter that it can carry. Expansion fills in structure and never judges values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.domain.methods import METHODS
from bitwright.errors import FieldProblem, shorten
from bitwright.request import ADAPTER_SHORTHAND


@dataclass(frozen=True)
class AdapterRecipe:
    """The kind of adapter, and the fields of `quantization` where the request does not give them."""

    kind: str
    quantization: Mapping[str, object]

    def expands_to(self) -> dict[str, object]:
        """As parts of a request, for tables."""
        return {**self.quantization, "adapter": {"kind": self.kind}}


_CODEBOOK: Mapping[str, object] = MappingProxyType({"method": "nf"})
_AFFINE: Mapping[str, object] = MappingProxyType({"method": "rtn", "symmetric": False})

ADAPTER_RECIPES: MappingProxyType[str, AdapterRecipe] = MappingProxyType(
    {
        "qlora": AdapterRecipe("lora", _CODEBOOK),
        "qa-lora": AdapterRecipe("qa-lora", _AFFINE),
        "q-bara": AdapterRecipe("q-bara", _CODEBOOK),
        "q-blora": AdapterRecipe("q-bara", _CODEBOOK),
        "qa-hira": AdapterRecipe("qa-hira", _AFFINE),
        "qa-blora": AdapterRecipe("qa-blora", _AFFINE),
        "bayesian-lora": AdapterRecipe("bayesian-lora", _CODEBOOK),
    }
)


def expand_adapter(body: dict[str, object]) -> list[FieldProblem]:
    """Replaces a recipe in `body` by its base, and fills in the adapter; the problems that only this can see.

    A `finetune` without an adapter trains a LoRA, which goes on from the method's own factors if it makes some.
    """
    inner = body.get("quantization")
    holder: Mapping[str, object] = inner if isinstance(inner, Mapping) else body
    name, problems = holder.get("method"), list[FieldProblem]()
    if isinstance(name, str) and name in ADAPTER_RECIPES:
        recipe = ADAPTER_RECIPES[name]
        problems += expand_recipe(body, name, recipe)
        fields = {**recipe.quantization, **holder, "method": recipe.quantization["method"]}
        if holder is inner:
            body["quantization"] = fields
        else:
            body |= {key: value for key, value in fields.items() if key in recipe.quantization or key in body}
    elif body.get("finetune") is not None and body.get("adapter") is None:
        body["adapter"] = _lora_of(holder)
    return problems


def expand_recipe(body: dict[str, object], name: str, recipe: AdapterRecipe) -> list[FieldProblem]:
    """Puts the adapter that a recipe names into `body`, with its shorthand fields; what contradicts it."""
    given, problems = body.get("adapter"), []
    top = {field: body.pop(field) for field in ADAPTER_SHORTHAND if field in body}
    if given is None:
        body["adapter"] = {"kind": recipe.kind, **top}
    elif isinstance(given, Mapping):
        problems += [_given_twice(field, value) for field, value in top.items()]
        if given.get("kind", recipe.kind) != recipe.kind:
            detail = f"method {name!r} stands for {recipe.kind!r} here; leave the field out, or name the base in method"
            value = shorten(given["kind"])
            problems.append(FieldProblem(field="adapter.kind", code="conflicting_fields", detail=detail, value=value))
        body["adapter"] = {**given, "kind": recipe.kind}
    return problems


def _given_twice(field: str, value: object) -> FieldProblem:
    detail = f"move {field} into adapter: its fields stand either there or at the top, not in both places"
    return FieldProblem(field=field, code="conflicting_fields", detail=detail, value=shorten(value))


def _lora_of(holder: Mapping[str, object]) -> dict[str, object]:
    """A LoRA of the rank and alpha of the method's factors, where its spec has these fields."""
    info = METHODS.get(str(holder.get("method")))
    known = info.spec.model_fields if info else {}
    shared: dict[str, object] = {
        field: holder.get(field, known[field].default) for field in ("rank", "alpha") if field in known
    }
    return {"kind": "lora", **shared}
