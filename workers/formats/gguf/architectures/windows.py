"""Layers that see a window of the text, as keys of a GGUF file."""

from workers.formats.gguf.architectures.family import Config, Values

SLIDING = "sliding_attention"


def windows(config: Config) -> Values:
    """The window, and which layers have it; nothing where none has."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if not window or not isinstance(types, list) or SLIDING not in types:
        return {}
    return {
        "attention.sliding_window": int(window),
        "attention.sliding_window_pattern": [each == SLIDING for each in types],
    }
