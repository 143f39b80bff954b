"""Tensors of a checkpoint that fit no parameter, and parameters without a tensor: what is meant, and the way out.

transformers leaves tensors aside that its model does not have, and warns: value heads, blocks that predict further
tokens, what another part of a larger model had. So does this service. It refuses what transformers would only warn of
where the model would not be the one that was trained: parameters that nothing fills, and tensors inside a block that
computes without them.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from app.domain.inputs.quantized_tensors import HINT, quantized_tensor
from bitwright.errors import BitwrightError, CorruptCheckpoint, UnsupportedArchitecture, UnsupportedCheckpoint

NAMED = 4
"""Tensors that a message names."""
WRAPPERS = {
    "_orig_mod.": "torch.compile's wrapper: save model._orig_mod",
    "module.": "a wrapper of data parallelism: save model.module",
    "base_model.model.": "peft's wrapper: save what merge_and_unload() returns",
}
BIASES = (
    "config.json says that these linears have no bias (attention_bias, mlp_bias): set it to true, or remove the tensors"
)


def left_out_warning(names: Sequence[str]) -> str:
    """Warning about tensors that the model does not have."""
    return (
        f"{len(names)} tensors of the checkpoint belong to no parameter and are left out, as transformers does: "
        f"{_named(names)}"
    )


@dataclass(frozen=True)
class Skeleton:
    """The model that config.json describes: its parameters, the name and number of its blocks, and whether it ties its
    head to the embeddings."""

    parameters: Collection[str]
    blocks: str
    layers: int
    tied_head: bool

    def layer_of(self, name: str) -> int | None:
        """The number of the block that a name is in; None outside the blocks, or beyond the last one."""
        for prefix in (f"{self.blocks}.", f"{self.blocks.partition('.')[2]}."):
            number = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and number.isdecimal() and int(number) < self.layers:
                return int(number)
        return None


def demand_a_model(model: Skeleton, foreign: Sequence[str], missing: Sequence[str], dtypes: Mapping[str, str]) -> None:
    """Check that a model whose tensors fit but for these is the one that was meant.

    foreign   stored names that fit no parameter
    missing   parameters without a tensor
    dtypes    stored name to safetensors dtype, of all tensors

    Raises:
        UnsupportedArchitecture: the weights are quantized already.
        UnsupportedCheckpoint: the names are those of an adapter.
        CorruptCheckpoint: names and config.json do not fit together.
    """
    quantized = quantized_tensor((name, dtypes[name]) for name in foreign)
    if quantized is not None:
        detail = f"the checkpoint is quantized already: {quantized[0]} is {quantized[1]}"
        raise UnsupportedArchitecture(detail, field="model", value=quantized[0], hint=HINT)
    if any(".lora_" in name for name in foreign):
        adapter = next(name for name in foreign if ".lora_" in name)
        hint = "merge the adapter into its base first: save what peft's merge_and_unload() returns"
        detail = f"the checkpoint holds an unmerged adapter: {adapter}"
        raise UnsupportedCheckpoint(detail, field="model", value=adapter, hint=hint)
    if missing:
        raise _missing(model, foreign, missing)
    inside = [name for name in foreign if model.layer_of(name) is not None]
    if inside:
        biases = all(name.endswith(".bias") for name in inside)
        hint = BIASES if biases else "give the config.json that was saved with these weights, or remove the tensors"
        detail = f"{len(inside)} tensors are in blocks that compute without them: {_named(inside)}"
        raise CorruptCheckpoint(detail, field="model", value=inside[0], hint=hint)


def _missing(model: Skeleton, foreign: Sequence[str], missing: Sequence[str]) -> BitwrightError:
    prefix = _common_prefix(model.parameters, foreign)
    detail = f"the checkpoint has no tensor for {len(missing)} parameters: {_named(missing)}"
    hint = "fetch or send the checkpoint again: a file of it may be missing"
    if prefix is not None:
        known = f" ({WRAPPERS[prefix]})" if prefix in WRAPPERS else ""
        detail = f"the names of the tensors begin with {prefix!r}, and the model's do not"
        hint = f"save the model without that prefix{known}; or rename the tensors: name.removeprefix({prefix!r})"
    elif list(missing) == ["lm_head.weight"] and not model.tied_head:
        hint = f"where the head is the embedding matrix, set tie_word_embeddings to true in config.json; else {hint}"
    elif all(name.endswith(".bias") for name in missing):
        hint = f"if these linears have no bias, set attention_bias or mlp_bias to false in config.json; else {hint}"
    elif (blocks := _stored_blocks(model, missing)) is not None:
        hint = (
            f"the tensors are of {blocks} blocks: set num_hidden_layers so in config.json, if that is all; else {hint}"
        )
    return CorruptCheckpoint(detail, field="model", value=missing[0], hint=hint)


def _stored_blocks(model: Skeleton, missing: Sequence[str]) -> int | None:
    """Number of stored blocks, if only the last ones are missing."""
    numbers = {model.layer_of(name) for name in missing}
    there = sorted(set(range(model.layers)) - numbers)
    is_head = there == list(range(len(there))) and None not in numbers
    return len(there) if is_head and 0 < len(there) < model.layers else None


def _common_prefix(parameters: Collection[str], foreign: Sequence[str]) -> str | None:
    """The prefix that most foreign names have before a parameter's name."""
    prefixes: Counter[str] = Counter()
    for name in foreign:
        parts = name.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in parameters:
                prefixes[".".join(parts[:count]) + "."] += 1
                break
    if not prefixes:
        return None
    prefix, count = prefixes.most_common(1)[0]
    return prefix if 2 * count > len(foreign) else None


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def misfit(name: str, dtype: str, shape: tuple[int, ...], wanted: tuple[int, ...], parameter: str) -> BitwrightError:
    """The error of a tensor that has its parameter's name, but not its shape, or no dtype that is read."""
    quantized = quantized_tensor([(name, dtype)])
    if quantized is not None:
        detail = f"the checkpoint is quantized already: {name} is {quantized[1]}"
        return UnsupportedArchitecture(detail, field="model", value=name, hint=HINT)
    detail = f"{name} is {dtype} of shape {shape}; config.json promises floats of shape {wanted}"
    hint = "give the config.json that was saved with these weights"
    if parameter.endswith(("embed_tokens.weight", "lm_head.weight")) and shape[1:] == wanted[1:]:
        hint = f"the vocabulary was resized: set vocab_size to {shape[0]} in config.json"
    return CorruptCheckpoint(detail, field="model", value=name, hint=hint)
