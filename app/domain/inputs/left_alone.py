"""Parts of a model that are never quantized, by the names of its modules: one rule for every way to quantize.

Routers and gates of mixtures decide which experts run: a rounded one sends tokens elsewhere. Convolutions, step sizes
and small projections of recurrent layers and of per-layer embeddings are a few numbers on which much depends; runtimes
keep them in 16 bits. Images and sounds are not what calibration text exercises. Blocks that predict further tokens are
not called by the model.
"""

import re

LEFT_ALONE: tuple[tuple[str, str], ...] = (
    (r"router|gate|shared_expert_gate|gate_weight|wg", "routers and gates, which choose experts"),
    (r"dt_.*|x_proj|A_log", "step sizes and inputs of state spaces, whose weights are used without a call"),
    (r"indexer", "indexes of tokens that attention looks up"),
    (r"per_layer_.*", "per-layer embeddings"),
    (r"altup.*|laurel.*|.*hyper_connection.*|hc_.*", "mixing of residual streams"),
    (r"mtp.*|.*nextn.*", "blocks that predict further tokens"),
    (r".*(visual|vision|audio|image|video).*|.*projector.*|embed_vision", "images, sounds and what joins them to text"),
    (r".*norm.*|ln_.*", "norms"),
    (r"embed_.*|.*embeddings?|emb|wte|wpe|word_embeddings.*|.*position.*|.*rotary.*", "embeddings"),
    (r"score|classifier|classification_head|value_head", "classifiers"),
)
"""Expressions that the whole of one part of a dotted name fits, and what they are about."""
CONVOLUTION = re.compile(r".*conv(1d|2d|3d)?", re.IGNORECASE)
"""The last part of a convolution's name; linears beside one may lie in a module of that name."""
_PATTERNS = [(re.compile(pattern, re.IGNORECASE), about) for pattern, about in LEFT_ALONE]


def left_alone(name: str) -> str | None:
    """Parts of a model that a module of this dotted name, with or without `.weight`, is of and that are never
    quantized; None if it is of no such part."""
    parts = name.removesuffix(".weight").split(".")
    if CONVOLUTION.fullmatch(parts[-1]):
        return "convolutions"
    return next((about for pattern, about in _PATTERNS for part in parts if pattern.fullmatch(part)), None)


FURTHER_PARTS = (
    r"(.*\.)?(mtp|nextn)[^.]*\..*",
    r".*(visual|vision|audio|image|video|projector|multi_modal|multimodal).*",
)
"""Stored tensors of what a text model does not run: blocks that predict further tokens, and other senses."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def is_further_part(name: str, layers: int, more: int = 0) -> bool:
    """True if a stored tensor that fits no parameter of a text model is known to belong to another part of the model.

    layers   blocks of the model
    more     blocks that are counted on after the last and predict further tokens
    """
    number = _LAYER.search(name)
    beyond = number is not None and layers <= int(number[1]) < layers + more
    return beyond or any(re.fullmatch(pattern, name) for pattern in FURTHER_PARTS)
