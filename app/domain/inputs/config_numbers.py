"""Numbers of a `config.json` that size a model, and the largest that are believed: far above any published model.

A library allocates what a configuration says before it has seen a weight, so that every number is judged before one
reads it: by its name where that is known, by the ending of its name else.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from bitwright.errors import CorruptCheckpoint

MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 1024, 1 << 20, 1 << 24
"""A configuration beyond them is damaged or hostile, and never sizes a buffer."""
MAX_POSITIONS, MAX_EXPERTS, MAX_LABELS = 1 << 28, 1 << 16, 1 << 16
MAX_NUMBER = 1 << 53
"""Of any whole number: beyond it JSON's readers do not agree on what it is."""
MAX_ALL_EXPERTS = 1 << 18
"""Layers times experts: each is a module of its own."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
QUANTIZED = "quantization_config"
"""A part that `app.domain.inputs.quantized` judges, by the tensors."""
WAY_OUT = "correct that field of config.json, or take the file that came with the weights"

COUNTS: MappingProxyType[str, int] = MappingProxyType(
    {
        **dict.fromkeys(LAYERS, MAX_LAYERS),
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads"), MAX_WIDTH),
        **dict.fromkeys(("num_key_value_heads", "head_dim", "moe_intermediate_size"), MAX_WIDTH),
        **dict.fromkeys(EXPERTS, MAX_EXPERTS),
        "num_labels": MAX_LABELS,
        "vocab_size": MAX_VOCABULARY,
    }
)
"""Numbers under all of their names: not negative, and no larger than this."""
ENDINGS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"vocab_size.*|.*token_(id|index)"), MAX_VOCABULARY),
    (re.compile(r".*(position|seq_len|window_size|sliding_window|ctx|context|chunk_size).*"), MAX_POSITIONS),
    (re.compile(r".*_layers?"), MAX_LAYERS),
    (
        re.compile(
            r"(d|n|num)_(embd|model|inner|head|heads|groups?|kv_heads|channels)|expand|conv_kernel|conv_L_cache|"
            r".*_(size|dims?|heads|experts|rank|channels|groups?|kernel|kernel_size|d_conv|d_state|expand)"
        ),
        MAX_WIDTH,
    ),
)
"""Expressions that the whole of a name fits, the first that does counts; and the largest magnitude."""


def check_numbers(config: Mapping[str, object]) -> None:
    """Check the numbers of a decoded `config.json` and of its parts.

    Raises:
        CorruptCheckpoint: one is not a whole number where it must be, or out of any sensible range.
    """
    _check_values(config)
    for part in parts_of(config):
        layers, experts = (_largest(part, names) for names in (LAYERS, EXPERTS))
        if layers * experts > MAX_ALL_EXPERTS:
            detail = f"config.json has {layers} layers of {experts} experts; at most {MAX_ALL_EXPERTS} in all are read"
            raise CorruptCheckpoint(detail, field="num_experts", value=experts, hint=WAY_OUT)


def _check_values(config: Mapping[str, object]) -> None:
    for name, value in config.items():
        if name == QUANTIZED:
            continue
        if name in COUNTS and isinstance(value, int | float | str) and not isinstance(value, bool):
            if not isinstance(value, int) or not 0 <= value <= COUNTS[name]:
                detail = f"config.json has {name} = {value!r}; it must be a whole number up to {COUNTS[name]}"
                raise CorruptCheckpoint(detail, field=name, value=value, hint=WAY_OUT)
        elif isinstance(value, Mapping):
            _check_values(value)
        else:
            limit = _limit(name)
            for number in _numbers(value):
                if abs(number) > limit:
                    detail = f"config.json has {name} = {number}; it must be no further from 0 than {limit}"
                    raise CorruptCheckpoint(detail, field=name, value=number, hint=WAY_OUT)


def _limit(name: str) -> int:
    return next((limit for pattern, limit in ENDINGS if pattern.fullmatch(name)), MAX_NUMBER)


def _numbers(value: object) -> Iterator[int]:
    """The whole numbers of a value: itself, or those of a list, in which mappings are parts of their own."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, Mapping):
                _check_values(entry)
            else:
                yield from _numbers(entry)


def parts_of(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """A decoded configuration and those within it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from parts_of(value)


def _largest(part: Mapping[str, object], names: tuple[str, ...]) -> int:
    found = (value for name in names if isinstance(value := part.get(name), int))
    return max(found, default=0)


NAMES_OF_A_LAYER = 128
"""Tensors beside experts: linears, norms and biases, in up to six parts where they are stored quantized."""
NAMES_OF_AN_EXPERT = 24
"""Three linears, in up to six parts, and biases."""
FEWEST_LAYERS = 128
"""Of a model whose layers a configuration counts under a name that nobody knows."""
ENTRY_BYTES = 320
"""Of a tensor in a header: names are about a third of that."""
SPARE_BYTES = 1 << 20
"""Of a header, for what stands beside its tensors."""


def names_of(config: Mapping[str, object]) -> int:
    """The most tensors that a checkpoint of a decoded `config.json` can name, generously."""
    found = 0
    for part in parts_of(config):
        layers = _largest(part, LAYERS)
        found += layers * (NAMES_OF_A_LAYER + NAMES_OF_AN_EXPERT * _largest(part, EXPERTS))
    return max(found, FEWEST_LAYERS * NAMES_OF_A_LAYER)


def header_bytes(config: Mapping[str, object]) -> int:
    """The most bytes that a header or an index needs for so many names."""
    return SPARE_BYTES + ENTRY_BYTES * names_of(config)
