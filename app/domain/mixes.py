"""Requests whose types llama.cpp's mixes give, bound to a model: the facts that the rules of a mix ask for.

A mix says nothing of a linear before the model's number of layers, heads and experts is known. A request is bound to
them where its model is looked at, and again where that is opened; what is stored of it stays as it was posted.
"""

from collections import Counter
from collections.abc import Mapping

from app.domain.inputs.architectures import ARCHITECTURES
from app.domain.inputs.inspection import Inspection
from app.domain.methods import Scheme
from app.domain.methods.block_presets import MixFacts
from app.domain.request.job_request import JobRequest
from app.domain.sizes.untied_heads import is_tied
from app.domain.weight_targets import text_config

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def facts_of(config: Mapping[str, object], tied: bool) -> MixFacts:
    """The facts that a decoded config.json tells.

    tied   whether the embeddings are the head
    """
    text = text_config(config)
    accepted = ARCHITECTURES.get(str(config.get("model_type")))
    values = {**({} if accepted is None else accepted.defaults), **text}
    heads = _number(values, HEADS)
    # With latent attention llama.cpp counts one head of keys and values.
    latent = _number(values, ("kv_lora_rank",)) > 0
    grouped = heads // max(1, 1 if latent else _number(values, KEY_VALUE_HEADS) or heads)
    return MixFacts(_number(values, LAYERS), grouped, _number(values, EXPERTS), tied)


def bound(request: JobRequest, config: Mapping[str, object], tied: bool) -> JobRequest:
    """The request for a model of that configuration; as it is where no mix asks for facts."""
    if request.quantization.mix() is None and not _outer_mixes(request):
        return request
    spec = request.quantization.of_model(facts_of(config, tied))
    return request.model_copy(update={"quantization": spec})


def bound_to(request: JobRequest, inspection: Inspection) -> JobRequest:
    """The request for a model that was looked at."""
    return bound(request, inspection.config, is_tied(inspection))


def _outer_mixes(request: JobRequest) -> bool:
    given = (request.quantization.modules.embeddings, request.quantization.modules.head)
    return any(one is not None and one.scheme is not None for one in given)


def _number(values: Mapping[str, object], names: tuple[str, ...]) -> int:
    found = (values.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)


def fallback_words(wanted: Mapping[str, Scheme], widths: Mapping[str, int], bits: float | None = None) -> str | None:
    """A warning of linears whose rows are not whole blocks of their types; None where all are.

    wanted   by full name, before they are fitted to the inputs
    widths   inputs of each
    bits     of a weight of all that is quantized
    """
    moved: Counter[tuple[str, str]] = Counter()
    for name, scheme in wanted.items():
        fitted = scheme.fitted(widths[name])
        if fitted != scheme:
            moved[str(scheme.name), str(fitted.name)] += 1
    if not moved:
        return None
    parts = [f"{count} get {other} in place of {name}" for (name, other), count in sorted(moved.items())]
    size = "" if bits is None else f"; with that a weight takes {bits:.4g} bits"
    return (
        f"of {len(wanted)} linears {sum(moved.values())} have rows that are no whole blocks of their type, and fall "
        f"back to the one that llama.cpp takes: {', '.join(parts)}{size}"
    )
