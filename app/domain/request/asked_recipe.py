"""The recipe that a request named, which its full form no longer says."""

from collections.abc import Mapping

from app.domain.methods import RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.domain.request.job_request import JobRequest


def asked_recipe(body: Mapping[str, object], request: JobRequest) -> str | None:
    """The recipe that `body` named as its method; of a full form, the one that it spells out; None: a plain method."""
    quantization = body.get("quantization")
    method = (quantization if isinstance(quantization, Mapping) else body).get("method")
    if isinstance(method, str) and (method in RECIPES or method in ADAPTER_RECIPES):
        return method
    return spelled_out(request)


def spelled_out(request: JobRequest) -> str | None:
    """The adapter recipe whose base and kind of adapter the request has."""
    if request.adapter is None:
        return None
    base = request.quantization.model_dump()
    for name, recipe in ADAPTER_RECIPES.items():
        if recipe.kind == request.adapter.kind and recipe.quantization.items() <= base.items():
            return name
    return None
