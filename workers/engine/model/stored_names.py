"""Which tensor of a checkpoint fills which parameter or persistent buffer of a model, by transformers' own mapping."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from app.domain.inputs.left_alone import is_further_part
from bitwright.errors import CorruptCheckpoint
from workers.engine.model.checkpoint import FLOAT_DTYPES, Checkpoint
from workers.engine.model.foreign_tensors import Skeleton, demand_a_model, misfit


@dataclass(frozen=True)
class StoredNames:
    """Names of a model's parameters against those of a checkpoint.

    sources    full name of a parameter or persistent buffer -> the stored tensor that fills it
    buffers    those of them that are buffers
    tied       parameter -> the one that it is tied to
    left_out   stored tensors that nothing explains
    """

    checkpoint: Checkpoint
    sources: Mapping[str, str]
    buffers: tuple[str, ...]
    tied: Mapping[str, str]
    left_out: tuple[str, ...]

    def read(self, name: str) -> Tensor:
        """The tensor of a parameter or buffer on the host, in the dtype of the file."""
        return self.checkpoint.read(self.sources[self.tied.get(name, name)])


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint, blocks: str) -> StoredNames:
    """The names by transformers' own name mapping. `blocks` is the name of the list of decoder blocks.

    Raises:
        CorruptCheckpoint: a parameter has no tensor, a tensor of a block fills none, or their shapes differ.
        UnsupportedArchitecture: the weights are quantized already.
        UnsupportedCheckpoint: an adapter is not merged.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict().keys() - parameters.keys()
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = dict.fromkeys(parameters, True)
    sources: dict[str, str] = {}
    foreign: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in parameters or converter is not None:
            if not _is_ignored(model, target):
                foreign.append(name)
            continue
        is_number = tensor.dtype in FLOAT_DTYPES or target in persistent
        if tuple(parameters[target].shape) != tensor.shape or not is_number:
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
    missing = [name for name in missing if name not in persistent or _is_constant(parameters[name])]
    skeleton = Skeleton(model.state_dict(), blocks, layers, tied_head=bool(_tied_names(model)))
    more = int(getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0)
    strangers = [name for name in foreign if not is_further_part(name, layers, more)]
    demand_a_model(skeleton, strangers, missing, {name: tensor.dtype for name, tensor in checkpoint.tensors.items()})
    buffers = tuple(name for name in sources if name in persistent)
    return StoredNames(checkpoint, sources, buffers, _tied_names(model), tuple(strangers))


def _is_constant(buffer: Tensor) -> bool:
    """True for a buffer that initialization fills with one number: what is computed from a configuration varies."""
    return bool((buffer == buffer.flatten()[:1]).all())


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Names that transformers itself leaves aside, such as the rotary frequencies of old Llama checkpoints."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq$"}
    return any(re.search(pattern, name) for pattern in patterns)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter that it is tied to."""
    return dict(model.all_tied_weights_keys)


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
