"""Quantized embeddings in the quantization_config of compressed-tensors: one group for linears, head and embeddings.

Targets are matched by the names of modules or parts of their classes' names: `Embedding` hits transformers' embeddings
and vLLM's. transformers 5.23 has no module that looks rows up in packed weights, and reads such a checkpoint only where
it unpacks all weights while loading, for which it knows one scheme; so `run_compressed` is false, of which older
releases know, and `dequantize`, which takes its place, is true.
"""

from collections.abc import Mapping
from typing import Any

TARGET = "Embedding"


def with_embeddings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json with the embeddings in the one group of `quantization_config`."""
    config = fields["quantization_config"]
    ((name, group),) = config["config_groups"].items()
    targets = list(dict.fromkeys([*group["targets"], TARGET]))
    unpacked = {"config_groups": {name: {**group, "targets": targets}}, "run_compressed": False, "dequantize": True}
    return {**fields, "quantization_config": {**config, **unpacked}}
