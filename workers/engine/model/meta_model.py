"""Builds a model's modules without weights, in the class and the dtypes in which transformers loads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from bitwright.errors import BitwrightError, CorruptCheckpoint, UnsupportedArchitecture
from workers.engine.model import fused_blocks
from workers.engine.model.buffers import fill_buffers
from workers.engine.model.checkpoint import FLOAT_DTYPES, Checkpoint, read_json
from workers.formats.library_config import FILE, library_config


def configuration(checkpoint: Checkpoint) -> PreTrainedConfig:
    """config.json as transformers reads it.

    Raises:
        CorruptCheckpoint: it does not.
    """
    try:
        config = library_config(checkpoint.folder, read_json(checkpoint.folder / FILE))
    except (BitwrightError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever its validators raise
        words = _no_dtype(checkpoint.config) or _words(error, checkpoint.folder)
        raise CorruptCheckpoint(
            f"config.json is not a valid {checkpoint.config.get('model_type')} configuration: {words}",
            field="model",
            hint="correct that field of config.json, or take the file that came with the weights",
        ) from error
    if checkpoint.has_copies:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return config


def model_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that transformers loads the model in where none is asked for.

    The configuration names it; else the index does; else the first floating-point tensor, by the names of files and
    tensors, has it.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    named = getattr(torch, checkpoint.index_dtype or "", None)
    if isinstance(named, torch.dtype):
        return named
    order = sorted(checkpoint.tensors, key=lambda name: (checkpoint.tensors[name].file.name, name))
    dtypes = (checkpoint.tensors[name].dtype for name in order)
    return next((FLOAT_DTYPES[dtype] for dtype in dtypes if dtype in FLOAT_DTYPES), torch.float32)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class for a configuration: the one that it names, else that of causal language models.

    The named one first: for some wrappers of images and text the class of causal language models is the text alone, for
    others there is none.

    Raises:
        UnsupportedArchitecture: transformers has none, or the model decodes what an encoder reads.
    """
    named = next(iter(config.architectures or ()), "")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    found: Any = getattr(transformers, named, None) if named in known else None
    if found is None or not isinstance(config, found.config_class):
        mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
        if "text_config" in config.sub_configs:
            mappings.reverse()
        found = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if found is None or config.is_encoder_decoder:
        raise UnsupportedArchitecture(
            f"transformers has no causal language model of the type {config.model_type}",
            field="model",
            value=config.model_type,
            hint="choose a model that writes text from left to right",
        )
    chosen: type[PreTrainedModel] = found
    return chosen


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its buffers on the device and its parameters on meta, in the dtypes that it computes with.

    Raises:
        UnsupportedArchitecture: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)._from_config(config, dtype=dtype)
    except (BitwrightError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedArchitecture(
            f"transformers cannot build this {config.model_type} model: {_words(error)}",
            field="model",
            hint="correct config.json so that transformers builds a model from it without the model's own code",
        ) from error
    model.eval().requires_grad_(False)
    fill_buffers(model, device)
    _widen(model, dtype)
    return model


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters and buffers that transformers keeps in fp32 whatever the model's dtype, in fp32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = build_glob_alternation(list(plan))[0]
    for name, module in model.named_modules():
        for leaf, weight in module._parameters.items():
            if weight is not None and pattern.search(f"{name}.{leaf}"):
                module._parameters[leaf] = nn.Parameter(weight.float(), requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and pattern.search(f"{name}.{leaf}"):
                module._buffers[leaf] = buffer.float()


def _no_dtype(config: Mapping[str, object]) -> str | None:
    """Words about a dtype that torch does not have; None where it has it, or none is named."""
    for field in ("dtype", "torch_dtype"):
        named = config.get(field)
        if isinstance(named, str) and not isinstance(getattr(torch, named.removeprefix("torch."), None), torch.dtype):
            return f"{field} is {named!r}, and torch has no dtype of that name"
    return None


def _words(error: Exception, folder: Path | None = None) -> str:
    """An error's own words without the folder, short: transformers writes whole configurations into some."""
    words = str(error) if folder is None else str(error).replace(str(folder), "the model's folder")
    return " ".join(words.split())[:300]


def fuse_blocks(blocks: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Puts hand-fused blocks in place of those of a known class, where there are parts for the device."""
    parts = fused_blocks.Parts.on(device, dtype)
    if parts is None:
        return
    for name, block in blocks.named_children():
        setattr(blocks, name, fused_blocks.fuse(block, parts))
