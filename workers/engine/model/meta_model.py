"""Builds a model's modules without weights, and says which tensor of the checkpoint fills which parameter."""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture
from workers.engine.model import fused_blocks
from workers.engine.model.checkpoint import FLOAT_DTYPES, Checkpoint
from workers.engine.model.foreign_tensors import Skeleton, demand_a_model, misfit


def configuration(checkpoint: Checkpoint) -> PreTrainedConfig:
    """config.json as transformers reads it.

    Raises:
        CorruptCheckpoint: it does not.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its validators raise
        words = _words(error, checkpoint.folder)
        raise CorruptCheckpoint(
            f"config.json is not a valid {checkpoint.config.get('model_type')} configuration: {words}",
            field="model",
            hint="correct that field of config.json, or take the file that came with the weights",
        ) from error


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


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its buffers on the device and its parameters on meta.

    Raises:
        UnsupportedArchitecture: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedArchitecture(
            f"transformers cannot build this {config.model_type} model: {_words(error)}",
            field="model",
            hint="correct config.json so that AutoModelForCausalLM.from_config takes it without the model's own code",
        ) from error
    model.eval().requires_grad_(False)
    _fill_buffers(model, device)
    return model


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


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Gives every buffer memory and the value that transformers' own initialization computes for it.

    Raises:
        UnsupportedArchitecture: a buffer is left that this initialization does not fill.
    """
    for name, module in model.named_modules():
        empty = [leaf for leaf, buffer in module._buffers.items() if buffer is not None]
        for leaf in empty:
            # NaN first, so that a buffer that nothing fills is seen.
            module._buffers[leaf] = torch.full_like(module._buffers[leaf], torch.nan, device="cpu")
        if empty:
            model._init_weights(module)
        for leaf in empty:
            buffer = module._buffers[leaf]
            if buffer is None or buffer.isnan().any():
                hint = "choose a model that transformers builds from its config.json alone"
                raise UnsupportedArchitecture(f"nothing computes the buffer {name}.{leaf}", field="model", hint=hint)
            module._buffers[leaf] = buffer.to(device)


def tensor_sources(model: PreTrainedModel, checkpoint: Checkpoint, blocks: str) -> tuple[dict[str, str], list[str]]:
    """Full parameter name -> name of the checkpoint's tensor that fills it, by transformers' own name mapping.

    Besides, the tensors that fill none and are left out. `blocks` is the name of the list of decoder blocks.

    Raises:
        CorruptCheckpoint: a parameter has no tensor, a tensor of a block fills none, or their shapes differ.
        UnsupportedArchitecture: the weights are quantized already.
        UnsupportedCheckpoint: an adapter is not merged.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = dict.fromkeys(parameters, True)
    sources: dict[str, str] = {}
    foreign: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if _is_ignored(model, target):
            continue
        if target not in parameters or converter is not None:
            foreign.append(name)
            continue
        if tuple(parameters[target].shape) != tensor.shape or tensor.dtype not in FLOAT_DTYPES:
            raise misfit(name, tensor.dtype, tensor.shape, tuple(parameters[target].shape), target)
        if target in sources:
            raise CorruptCheckpoint(
                f"the tensors {sources[target]} and {name} are both the parameter {target}",
                field="model",
                value=name,
                hint="remove one of them; transformers loads either, by the order of their names",
            )
        sources[target] = name
    _settle_tied_head(model, checkpoint, sources)
    missing = [name for name in parameters if name not in sources and name not in _tied_names(model)]
    layers = sum(1 for _ in model.get_submodule(blocks).children())
    skeleton = Skeleton(parameters, blocks, layers, tied_head=bool(_tied_names(model)))
    demand_a_model(skeleton, foreign, missing, {name: tensor.dtype for name, tensor in checkpoint.tensors.items()})
    return sources, foreign


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Names that transformers itself leaves aside, such as the rotary frequencies of old Llama checkpoints."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq$"}
    return any(re.search(pattern, name) for pattern in patterns)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter that it is tied to."""
    return dict(model.all_tied_weights_keys) if model.config.get_text_config().tie_word_embeddings else {}


def _settle_tied_head(model: PreTrainedModel, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    """Drops a stored copy of a tied parameter, having seen that it is one."""
    for copy, original in _tied_names(model).items():
        if copy in sources and original in sources:
            stored = sources.pop(copy)
            if not torch.equal(checkpoint.read(stored), checkpoint.read(sources[original])):
                raise CorruptCheckpoint(
                    f"config.json ties {copy} to {original}, but the checkpoint's tensors differ",
                    field="model",
                    value=stored,
                    hint="set tie_word_embeddings to false in config.json, or remove the extra tensor",
                )
        elif copy in sources:
            sources[original] = sources.pop(copy)
