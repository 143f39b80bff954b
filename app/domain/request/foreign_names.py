"""Names that other tools have for what a request says, and where a request says it.

Sources: the arguments and recipes of auto-round 0.16, llm-compressor 0.14, GPTQModel 7, AutoAWQ 0.2, transformers 5.23,
peft 0.19, trl 0.25 and llama.cpp's quantizer.
"""

import re
from types import MappingProxyType

FIELDS = MappingProxyType(
    {
        "method": ("algorithm", "quant_method", "quant_algo", "recipe", "modifier"),
        "bits": ("w_bit", "w_bits", "wbits", "num_bits", "nbits", "weight_bits", "load_in_4bit", "load_in_8bit"),
        "group_size": ("q_group_size", "groupsize", "block_size"),
        "symmetric": ("sym", "asym", "zero_point", "is_sym", "mode_sym"),
        "scheme": ("ftype", "outtype", "quant_type", "data_type", "weight_dtype", "wtype"),
        "steps": ("iters", "num_iterations", "n_iterations", "num_steps"),
        "learning_rate": ("lr",),
        "range_learning_rate": ("minmax_lr", "lwc_lr"),
        "damping": ("damp", "damp_percent", "dampening_frac", "percdamp"),
        "act_order": ("desc_act", "actorder"),
        "double_quantization": ("bnb_4bit_use_double_quant", "double_quant"),
        "quantized_inputs": ("enable_quanted_input",),
        "rank": ("r", "lora_r", "lora_rank"),
        "alpha": ("lora_alpha",),
        "dropout": ("lora_dropout",),
        "calibration.dataset": (
            "dataset",
            "calibration_dataset",
            "calib_dataset",
            "calib_data",
            "calibration_data",
            "imatrix",
        ),
        "calibration.num_samples": (
            "nsamples",
            "n_samples",
            "num_samples",
            "num_calibration_samples",
            "max_calib_samples",
            "calib_size",
        ),
        "calibration.sequence_length": (
            "seqlen",
            "seq_len",
            "sequence_length",
            "max_seq_length",
            "max_calib_seq_len",
            "max_length",
        ),
        "quantization.modules": ("modules",),
        "quantization.modules.ignore": (
            "ignore",
            "ignore_layers",
            "modules_to_not_convert",
            "llm_int8_skip_modules",
            "exclude",
        ),
        "quantization.modules.overrides": ("overrides", "layer_config", "dynamic", "config_groups"),
        "quantization.modules.head": ("quant_lm_head", "lm_head", "output_tensor_type"),
        "quantization.modules.embeddings": ("token_embedding_type", "quant_embedding"),
        "model.revision": ("revision", "model_revision", "commit"),
        "finetune.dataset": ("train_dataset", "train_file", "training_dataset"),
        "finetune.steps": ("max_steps",),
        "finetune.epochs": ("num_train_epochs",),
        "finetune.batch_size": ("per_device_train_batch_size", "train_batch_size"),
        "evaluation.dataset": ("eval_dataset", "test_dataset"),
        "evaluation.tasks": ("tasks", "eval_tasks"),
        "formats": ("format", "output_format", "export_format", "save_format"),
        "publish": ("push_to_hub", "hub_model_id", "repo_id", "upload_repo", "output_dir"),
        "name": ("run_name", "job_name", "model_name"),
        "metadata": ("labels", "tags"),
        "time_limit_seconds": ("timeout", "time_limit", "timeout_seconds"),
    }
)
"""Paths of fields, in shorthand where there is one, with the names that others have for them."""
NOT_ASKED = MappingProxyType(
    {
        "trust_remote_code": "code of a repository is never run, and model types of transformers need none",
        "dtype": "a model is read in the dtype of its config.json: leave the field out",
        "torch_dtype": "a model is read in the dtype of its config.json: leave the field out",
        "token": "a token of the Hub is sent as the header X-Hub-Token",
        "hf_token": "a token of the Hub is sent as the header X-Hub-Token",
        "hub_token": "a token of the Hub is sent as the header X-Hub-Token",
        "device_map": "the worker places the model, one block at a time: leave the field out",
        "low_gpu_mem_usage": "the worker holds one block at a time: leave the field out",
    }
)
"""Names that need no field, with what holds in their place."""
SCHEMES = MappingProxyType(
    {
        "w8a8": "int8",
        "fp8_dynamic": "fp8",
        "fp8_static": "fp8-tensor",
        "fp8_block": "fp8-block",
        "fpw8a16": "fp8a16",
        "mxfp4xfp8": "mxfp4",
        "q4_k_xl": "q4_k_m",
    }
)
"""Names of schemes, in lower case, with the nearest one here."""
FORMATS = MappingProxyType(
    {
        "gptq": ("auto_gptq", "gptqmodel"),
        "awq": ("auto_awq", "autoawq"),
        "compressed-tensors": ("llm_compressor", "llmcompressor", "auto_round", "safetensors", "vllm", "hf"),
        "gguf": ("llama.cpp", "llamacpp", "ollama"),
        "mlx": ("mlx-lm", "mlx_lm"),
        "bitsandbytes": ("bnb", "nf4"),
        "merged": ("fake", "fp16", "bf16", "dequantized"),
        "peft": ("lora", "adapter"),
    }
)
"""Formats with the names that others have for them."""
_WIDTHS = re.compile(r"w([2-8])a16(?:_?g(\d+))?(_asym)?")
_GROUP = 128
"""Columns that share a scale where such a name does not say it, as of compressed-tensors and auto-round."""
_PATHS = {_name: path for path, names in FIELDS.items() for _name in names}
_FORMATS = {_name: here for here, names in FORMATS.items() for _name in names}


def field_meant(name: str) -> str | None:
    """The field in the place of another tool's, as the end of a sentence; None where that is not known."""
    plain = name.lower().replace("-", "_")
    if plain in NOT_ASKED:
        return NOT_ASKED[plain]
    path = _PATHS.get(plain)
    return None if path is None else f"did you mean {path}?"


def value_meant(field: str, value: object) -> str | None:
    """The same for a value of `scheme`, `formats` or `bits`."""
    if field == "bits" and isinstance(value, float):
        return f'for a mean of chosen widths give {{"average": {value}}}'
    plain = value.lower() if isinstance(value, str) else ""
    if field == "scheme":
        return _scheme_meant(plain)
    kind, _, scheme = plain.partition(":")
    if field == "formats" and kind == "gguf" and scheme:
        return f'give formats: ["gguf"] and scheme: {scheme}'
    here = _FORMATS.get(plain) if field == "formats" else None
    return None if here is None else f"did you mean {here}?"


def _scheme_meant(plain: str) -> str | None:
    if match := _WIDTHS.fullmatch(plain):
        bits, group, asymmetric = match.groups()
        fields = [f"bits: {bits}", f"group_size: {group or _GROUP}", *(["symmetric: false"] if asymmetric else [])]
        return f"give {', '.join(fields)} in place of scheme"
    if plain in ("nf4", "fp4"):
        return "give method: nf in place of scheme"
    return f"did you mean {SCHEMES[plain]}?" if plain in SCHEMES else None
