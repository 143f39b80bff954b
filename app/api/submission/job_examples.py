"""The body of POST /v1/jobs in the OpenAPI document: shorthand and full form, with examples."""

from typing import Any

from app.domain.methods import MAX_BITS, METHODS, MIN_BITS, RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.store.ids import id_pattern

SHORTHAND_EXAMPLE = {"model": "HuggingFaceTB/SmolLM2-135M", "method": "signround", "bits": 4}
FINETUNE_EXAMPLE = {
    "model": "HuggingFaceTB/SmolLM2-135M",
    "method": "qa-hira",
    "bits": 4,
    "rank": 16,
    "finetune": {"dataset": "builtin", "steps": 500},
    "merge": "quantized",
}
CONTINUED_EXAMPLE = {
    "base_job": "job_01k6z3f8c2v9q4w7x5y1t0r8ab",
    "finetune": {"dataset": "builtin", "steps": 500},
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

METHOD_NAMES = [*METHODS, *RECIPES, *ADAPTER_RECIPES]
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
        "method": {
            "type": "string",
            "enum": METHOD_NAMES,
            "description": "A method or recipe of GET /v1/methods.",
        },
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


CONTINUED_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Continued",
    "description": "Finetuning that starts from the result of an earlier job, named as `base_job` or as `model`. Every "
    "other field of the full form may stand beside; model and quantization are those of that job.",
    "required": ["finetune"],
    "anyOf": [{"required": ["base_job"]}, {"required": ["model"]}],
    "properties": {
        "base_job": {"type": "string", "pattern": id_pattern("job"), "description": "A job of yours that succeeded."},
        "model": {"type": "string", "pattern": id_pattern("job"), "description": "The same."},
        "finetune": {"$ref": "#/components/schemas/Finetune"},
    },
}


REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": [SHORTHAND_SCHEMA, CONTINUED_SCHEMA, {"$ref": "#/components/schemas/JobRequest"}]},
                "examples": {
                    "shorthand": {"summary": "Shorthand", "value": SHORTHAND_EXAMPLE},
                    "finetune": {"summary": "Quantize, finetune, merge", "value": FINETUNE_EXAMPLE},
                    "continued": {"summary": "Finetune an earlier job's result", "value": CONTINUED_EXAMPLE},
                    "full": {"summary": "Full form", "value": FULL_EXAMPLE},
                },
            }
        },
    }
}
