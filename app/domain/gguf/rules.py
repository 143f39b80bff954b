"""Rules on a config.json for models that are to become GGUF files: llama.cpp's architectures are fixed.

What a configuration decides in transformers and llama.cpp has built in either makes a file that does not load or one
that computes another model. `tests/engine/ships/test_gguf_in_llama_cpp.py` holds the rules against its library.
"""

from collections.abc import Callable, Iterator, Mapping

from app.domain.gguf.architectures import ARCHITECTURES, COMPUTED_OTHERWISE, RELEASE, WRAPPERS, GgufArchitecture
from app.domain.gguf.peculiar import SLIDING

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""
WAY_OUT = 'leave gguf out, or ask for formats: ["merged"]'
UNTRUNCATED = frozenset({"gpt-oss"})
"""Architectures whose YaRN is without whole turns in transformers, which llama.cpp rounds to them."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")

Config = Mapping[str, object]


def language_model(model_type: str, config: Config) -> str:
    """`model_type` of the language model, which one with a vision tower has inside."""
    inner = config.get("text_config")
    own = inner.get("model_type") if isinstance(inner, Mapping) else None
    return own if isinstance(own, str) else WRAPPERS.get(model_type, model_type)


def unknown(model_type: str, inner: str) -> str:
    """The refusal of a type that llama.cpp does not know, or of which no file is written."""
    if inner in COMPUTED_OTHERWISE:
        return f"gguf is not written for {inner}: of llama.cpp {RELEASE}, {COMPUTED_OTHERWISE[inner]}"
    what = model_type if model_type == inner else f"{model_type}, with a {inner} inside"
    return f"gguf is written for the model types that llama.cpp {RELEASE} knows, and {what} is none of them"


def gguf_refusals(model_type: str, config: Config) -> list[str]:
    """Everything that the configuration says and a GGUF file cannot: field, value and way out of each.

    config   config.json, decoded; or transformers' reading of it, in which nothing is left out
    """
    inner = language_model(model_type, config)
    architecture = ARCHITECTURES.get(inner)
    if architecture is None:
        return [f"{unknown(model_type, inner)}; {WAY_OUT}"]
    text = config.get("text_config")
    own: Config = text if isinstance(text, Mapping) else config
    return [f"{problem}; {WAY_OUT}" for check in CHECKS for problem in check(architecture, own)]


def _activation(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    for name in ACTIVATIONS:
        activation = config.get(name)
        if activation is not None and activation not in architecture.activation:
            yield (
                f"config.json has {name} = {activation!r}, and a GGUF file cannot say that: llama.cpp's "
                f"{architecture.name} always computes {min(architecture.activation)}"
            )


def _biases(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    for name in architecture.biases:
        if config.get(name):
            yield (
                f"config.json has {name} = {config[name]!r}, and llama.cpp's {architecture.name} has no tensors for "
                "such biases: it would not load the file"
            )


def _demands(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    for name, values in architecture.demands.items():
        if name in config and config[name] not in values:
            yield (
                f"config.json has {name} = {config[name]!r}, and llama.cpp's {architecture.name} always computes with "
                f"{values[0]!r}"
            )


def _peculiar(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    for words in architecture.check(config):
        yield f"config.json has {words} (llama.cpp's {architecture.name})"


def _rotary(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    given = config.get("rope_scaling") or config.get("rope_parameters")
    rope: Config = given if isinstance(given, Mapping) else {}
    full = rope.get("full_attention")
    rope = full if isinstance(full, Mapping) else rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in architecture.rotary:
        known = " and ".join(sorted(architecture.rotary))
        yield (
            f"config.json has rotary scaling of the type {kind}, and gguf is written for {known} with llama.cpp's "
            f"{architecture.name}"
        )
    elif kind != "default" and rope.get("partial_rotary_factor", 1) != 1 and not architecture.partial:
        yield (
            f"config.json has partial_rotary_factor = {rope['partial_rotary_factor']!r}, and llama.cpp's "
            f"{architecture.name} turns whole heads"
        )
    elif kind == "yarn":
        yield from _yarn(architecture, rope)


def _yarn(architecture: GgufArchitecture, rope: Config) -> Iterator[str]:
    whole, part = rope.get("mscale_all_dim"), rope.get("mscale")
    scaled = bool(whole) and (not architecture.own_scale or part not in (1, whole))
    whole_turns = rope.get("truncate", True) or architecture.name in UNTRUNCATED
    wrong = {
        "attention_factor": rope.get("attention_factor"),
        "mscale_all_dim": whole if scaled else None,
        "truncate": None if whole_turns else False,
    }
    for name, value in wrong.items():
        if value is not None:
            yield (
                f"config.json has {name} = {value!r} of YaRN, and llama.cpp's {architecture.name} computes with the "
                "factor alone"
            )


def _window(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    window = _sliding_window(architecture, config)
    positions = config.get("max_position_embeddings", architecture.positions)
    if window is not None and isinstance(positions, int) and window < positions:
        yield (
            f"config.json has sliding_window = {window}, and llama.cpp's {architecture.name} attends to all "
            f"{positions} positions (max_position_embeddings): longer texts would be computed differently. Set "
            "max_position_embeddings to the window where the context may be as short"
        )


def _sliding_window(architecture: GgufArchitecture, config: Config) -> int | None:
    """The window that at least one layer has and a file cannot say; None without one."""
    if architecture.windows:
        return None
    window = config.get("sliding_window", 4096 if architecture.by_layer else architecture.window)
    if not isinstance(window, int) or isinstance(window, bool):
        return None
    if not architecture.by_layer:
        return None if architecture.window is None else window
    if not config.get("use_sliding_window", False):
        return None
    types, layers, first = (
        config.get("layer_types"),
        config.get("num_hidden_layers"),
        config.get("max_window_layers", 28),
    )
    if isinstance(types, list):
        return window if SLIDING in types else None
    some = not isinstance(layers, int) or not isinstance(first, int) or first < layers
    return window if some else None


def _heads(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    width, heads, hidden = config.get("head_dim"), config.get("num_attention_heads"), config.get("hidden_size")
    numbers = isinstance(width, int) and isinstance(heads, int) and isinstance(hidden, int)
    if architecture.square and numbers and width * heads != hidden:  # type: ignore[operator]
        yield (
            f"config.json has head_dim = {width}, and llama.cpp's {architecture.name} takes {heads} heads for the "
            f"whole hidden_size of {hidden}"
        )


def _layers(architecture: GgufArchitecture, config: Config) -> Iterator[str]:
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        yield f"config.json has num_hidden_layers = {layers}, and llama.cpp holds at most {MAX_LAYERS}"
    if config.get("per_layer_config") and not architecture.per_layer:
        yield f"config.json has per_layer_config, and llama.cpp's {architecture.name} has the same numbers in all"


CHECKS: tuple[Callable[[GgufArchitecture, Config], Iterator[str]], ...] = (
    _activation,
    _biases,
    _demands,
    _peculiar,
    _rotary,
    _window,
    _heads,
    _layers,
)
