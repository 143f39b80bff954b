"""The body of POST /v1/jobs in the OpenAPI document: shorthand and full form, with examples."""

from typing import Any

from app.domain.methods import MAX_BITS, METHODS, MIN_BITS

SHORTHAND_EXAMPLE = {"model": "HuggingFaceTB/SmolLM2-135M", "method": "signround", "bits": 4}
FINETUNE_EXAMPLE = {
    "model": "HuggingFaceTB/SmolLM2-135M",
    "method": "qa-hira",
    "bits": 4,
    "rank": 16,
    "finetune": {"dataset": "builtin", "steps": 500},
    "merge": "quantized",
}
FULL_EXAMPLE = {
    "model": {"source": "hub", "id": "HuggingFaceTB/SmolLM2-135M", "revision": "main"},
    "quantization": {
        "method": "signround",
        "bits": 4,
        "group_size": 64,
        "preset": "light",
        "modules": {"ignore": ["lm_head"], "overrides": {"model.layers.*.mlp.down_proj": {"bits": 8}}},
    },
    "calibration": {"dataset": {"source": "builtin"}, "num_samples": 128, "sequence_length": 512},
    "formats": ["compressed-tensors"],
    "require": {"max_perplexity_ratio": 1.1},
    "metadata": {"commit": "abc123"},
}

SHORTHAND_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Shorthand",
    "description": "Model as a string, and the fields of `quantization` at the top. `method` may name a recipe. "
    "Every other field of the full form may stand beside them.",
    "required": ["model", "method"],
    "properties": {
        "model": {
            "type": "string",
            "description": "`org/name` on the Hub, an absolute path, or `upl_…`.",
            "examples": ["HuggingFaceTB/SmolLM2-135M"],
        },
        "method": {"type": "string", "description": "A method or recipe of GET /v1/methods."},
        "bits": {"type": "integer", "minimum": MIN_BITS, "maximum": MAX_BITS},
        "group_size": {"type": "integer", "minimum": -1},
        "symmetric": {"type": "boolean"},
        "rank": {"type": "integer", "minimum": 1, "description": "Of the adapter, where the recipe trains one."},
        "preset": {
            "type": "string",
            "enum": list(dict.fromkeys(preset for info in METHODS.values() for preset in info.presets)),
        },
    },
}


REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": [SHORTHAND_SCHEMA, {"$ref": "#/components/schemas/JobRequest"}]},
                "examples": {
                    "shorthand": {"summary": "Shorthand", "value": SHORTHAND_EXAMPLE},
                    "finetune": {"summary": "Quantize, finetune, merge", "value": FINETUNE_EXAMPLE},
                    "full": {"summary": "Full form", "value": FULL_EXAMPLE},
                },
            }
        },
    }
}
