"""Tensors of a checkpoint that a job without a model quantizes, by names, shapes and dtypes alone: one pure rule.

A linear is a floating-point matrix `<name>.weight`, or one expert's part of a 3-D tensor of fused experts. What a
language model computes exactly by design (norms, routers, recurrent state), and what is no decoder layer (vision,
audio, projectors, multi-token prediction) stays as it is, and so does what has less than 32 rows or columns, or columns
that are no whole groups. Embeddings and head are quantized where the request gives them a scheme.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from app.domain.inputs.architectures import ARCHITECTURES, HEAD
from app.domain.inputs.left_alone import left_alone as part_left_alone
from app.domain.methods import PER_CHANNEL, Scheme, WeightSpec
from app.domain.methods.module_rules import (
    RULES,
    divides,
    dividing_sizes,
    field_of_name,
    indivisible_name,
    indivisible_outer,
    matches_any,
    outer_errors,
    unknown_module,
    unties,
)
from app.domain.methods.schemes import fits
from bitwright.errors import IndivisibleGroup, InputError, InvalidRequest, RequestError, UnsupportedArchitecture

WEIGHT = ".weight"
HEAD_TENSOR = HEAD + WEIGHT
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
LEAST_SIDE = 32
"""Fewer rows or columns than this: a gate, a time step, a lookup; nothing that takes room."""
HEADS = frozenset({HEAD, "embed_out", "output"})
"""Last names of modules that are a model's head; `output` only at the top of the tree."""
EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"})
"""Last names of modules that are the matrix of embeddings."""
IN_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "w13")
"""Fused experts' tensors that read hidden states; the others write them."""
OUT_ORDER = ("down_proj", "w2")
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Last names of linears that runtimes make one matrix of (vLLM 0.33)."""
INTERLEAVED = frozenset({"gpt_oss", "openai_privacy_filter"})
"""Types whose `gate_up_proj` has gate and up in turn, not one after the other (transformers 5.23)."""
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Types whose matrices are transformers' `Conv1D`, (in, out), which no name or shape shows (transformers 5.23)."""

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class TensorShape(Protocol):
    """A tensor of a file, as far as the rule looks at it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class ExpertPlace:
    """Place of an expert's weight (out, in) in a 3-D tensor.

    first, step   of its rows, or of its columns if the tensor holds (in, out)
    transposed    whether the tensor holds (in, out)
    """

    expert: int
    first: int
    step: int
    transposed: bool


@dataclass(frozen=True)
class Target:
    """A linear that is quantized: its name, the stored tensor, its shape (out, in), and its scheme."""

    name: str
    tensor: str
    shape: tuple[int, int]
    scheme: Scheme
    place: ExpertPlace | None = None


@dataclass(frozen=True)
class KeptPart:
    """An expert's linear that stays as it is, in a tensor of which others are quantized."""

    name: str
    tensor: str
    shape: tuple[int, int]
    place: ExpertPlace


@dataclass(frozen=True)
class Targets:
    """The linears that are quantized, in the order of the tensors' names, and why each other matrix is not."""

    linears: tuple[Target, ...]
    left_alone: Mapping[str, str]
    kept: tuple[KeptPart, ...] = ()

    def joined(self, name: str) -> tuple[Target, ...]:
        """The linear of that name and those that a runtime makes one matrix of with it, as names show, of one scheme.

        Queries, keys and values; gate and up, of an expert too.
        """
        return self._sets[name]

    @cached_property
    def _sets(self) -> dict[str, tuple[Target, ...]]:
        by_set: dict[tuple[str, int, Scheme], list[Target]] = {}
        for target in self.linears:
            parent, _, leaf = target.name.rpartition(".")
            index = next((i for i, names in enumerate(JOINED) if leaf in names), None)
            key = (target.name, -1) if index is None else (parent, index)
            by_set.setdefault((*key, target.scheme), []).append(target)
        return {target.name: tuple(targets) for targets in by_set.values() for target in targets}

    @property
    def embeddings(self) -> Target | None:
        """The matrix of embeddings, where it is quantized."""
        return next((target for target in self.linears if is_embeddings(target.name)), None)

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(out * width for out, width in (target.shape for target in self.linears))


def weight_targets(tensors: Mapping[str, TensorShape], config: Mapping[str, object], spec: WeightSpec) -> Targets:
    """The linears of a checkpoint that this spec quantizes.

    tensors   of the files, by stored name
    config    config.json, decoded

    Raises:
        UnknownModule: a pattern of the spec matches no linear.
        IndivisibleGroup: an override's group size does not divide a linear, or the default divides none.
        InvalidRequest: the head is to be quantized and is the embedding matrix, or everything is ignored.
        UnsupportedArchitecture: there is no linear.
    """
    candidates, left = _candidates(tensors, config, spec)
    for error in _errors(candidates, tensors, spec):
        raise error
    linears, parts = list[Target](), list[KeptPart]()
    for name, (tensor, shape, place) in candidates.items():
        scheme = _scheme_of(name, spec)
        if scheme is not None and scheme.divides(shape[1]):
            linears.append(Target(name, tensor, shape, scheme.fitted(shape[1]), place))
            continue
        size = None if scheme is None else scheme.group_size
        left[name] = "ignored by the request" if size is None else f"{shape[1]} columns are no whole groups of {size}"
        parts += [] if place is None else [KeptPart(name, tensor, shape, place)]
    divided = {target.tensor for target in linears}
    return Targets(tuple(linears), left, tuple(part for part in parts if part.tensor in divided))


def target_errors(
    tensors: Mapping[str, TensorShape], config: Mapping[str, object], spec: WeightSpec
) -> list[InputError | RequestError]:
    """Everything in a spec that does not fit the checkpoint; `weight_targets` raises the first."""
    return _errors(_candidates(tensors, config, spec)[0], tensors, spec)


Candidate = tuple[str, tuple[int, int], ExpertPlace | None]
"""Stored tensor, shape (out, in), and place in the tensor where that holds several linears."""


def _errors(
    candidates: Mapping[str, Candidate], tensors: Collection[str], spec: WeightSpec
) -> list[InputError | RequestError]:
    if not candidates:
        known = ", ".join(ARCHITECTURES)
        detail = f"the checkpoint has no matrix that could be quantized without its model; supported types are: {known}"
        return [UnsupportedArchitecture(detail, field="model", hint="choose a model of one of these types")]
    modules = [*candidates, *(name.removesuffix(WEIGHT) for name in tensors), HEAD]
    errors: list[InputError | RequestError] = [
        unknown_module(f"{RULES}.ignore.{index}", pattern, candidates)
        for index, pattern in enumerate(spec.modules.ignore)
        if not matches_any(pattern, modules)
    ]
    for pattern, override in spec.modules.overrides.items():
        matched = [name for name in candidates if fits(name, pattern)]
        errors += [] if matched else [unknown_module(f"{RULES}.overrides.{pattern}", pattern, candidates)]
        size = override.group_size
        misfit = [name for name in matched if size is not None and not divides(size, candidates[name][1][1])]
        if size is not None and misfit:
            field = f"{RULES}.overrides.{pattern}.group_size"
            errors.append(_indivisible(size, misfit[0], candidates[misfit[0]][1][1], field))
    return errors + _outer_errors(candidates, tensors, spec) + _group_errors(candidates, spec)


def _outer_errors(
    candidates: Mapping[str, Candidate], tensors: Collection[str], spec: WeightSpec
) -> list[InputError | RequestError]:
    """Misfits of the schemes of embeddings and head."""
    widths = {name: shape[1] for name, (_, shape, _) in candidates.items()}
    embeddings = next((name for name in widths if is_embeddings(name)), None)
    if spec.modules.embeddings is not None and embeddings is None:
        detail = "the checkpoint has no one matrix of embeddings, as far as names tell"
        hint = "leave modules.embeddings out"
        return [InvalidRequest(detail, field=f"{RULES}.embeddings", hint=hint)]
    width = 0 if embeddings is None else widths[embeddings]
    errors = outer_errors(spec, width, head=HEAD, tied=not has_head(tensors))
    head, width = spec.head_scheme(), next((widths[name] for name in widths if is_head(name)), 0)
    if spec.modules.head is not None and head is not None and width and not head.divides(width):
        errors.append(indivisible_outer(head, width, "head"))
    return errors


def _scheme_of(name: str, spec: WeightSpec) -> Scheme | None:
    """The scheme of a candidate; embeddings and head have their own fields for it."""
    if is_embeddings(name):
        return spec.embeddings_scheme()
    return spec.head_scheme() if is_head(name) and spec.modules.head is not None else spec.scheme_of(name)


def _group_errors(candidates: Mapping[str, Candidate], spec: WeightSpec) -> list[InputError | RequestError]:
    """An error where groups divide no linear at all; else those that they do not divide stay as they are."""
    schemes = {name: scheme for name in candidates if (scheme := _scheme_of(name, spec)) is not None}
    if not schemes:
        detail = "every linear of the checkpoint is ignored, so there is nothing to quantize"
        field, value = f"{RULES}.ignore", ", ".join(spec.modules.ignore)
        return [InvalidRequest(detail, field=field, value=value, hint="ignore fewer linears")]
    if any(scheme.divides(candidates[name][1][1]) for name, scheme in schemes.items()):
        return []
    name, scheme = next(iter(schemes.items()))
    if scheme.name is not None:
        field = field_of_name(spec, name)
        return [indivisible_name(scheme.name, scheme.group_size, name, candidates[name][1][1], field)]
    return [_indivisible(scheme.group_size, name, candidates[name][1][1], "quantization.group_size")]


def _indivisible(size: int, name: str, width: int, field: str) -> IndivisibleGroup:
    sizes = ", ".join(map(str, [*dividing_sizes(width), PER_CHANNEL]))
    detail = f"group_size {size} does not divide the {width} inputs of {name}"
    return IndivisibleGroup(detail, field=field, value=size, hint=f"use one of {sizes} (one group a row)")


def _candidates(
    tensors: Mapping[str, TensorShape], config: Mapping[str, object], spec: WeightSpec
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Linears by name, whatever the spec says of them, and why each other matrix is none."""
    text = text_config(config)
    layers = text.get("num_hidden_layers")
    found: dict[str, Candidate] = {}
    left: dict[str, str] = {}
    matrix = None if spec.modules.embeddings is None else embeddings_tensor(tensors)
    for tensor in sorted(tensors):
        entry, module = tensors[tensor], tensor.removesuffix(WEIGHT)
        if entry.dtype not in FLOATING or len(entry.shape) < 2:
            continue
        reason = left_alone(module, layers if isinstance(layers, int) else None)
        if is_head(module):
            reason = None if spec.scheme_of(HEAD) is not None and tensor.endswith(WEIGHT) else "the head"
        if tensor == matrix:
            reason = None
        if str(config.get("model_type")) in CONV1D:
            reason = "stored (in, out), as a Conv1D"
        if reason is not None:
            left[module] = reason
        elif len(entry.shape) == 3 and _of_experts(module):
            experts = list(_experts(tensor, entry.shape, text))
            found |= dict(experts)
            if not experts:
                left[module] = "fused experts whose orientation their shape does not show"
        elif len(entry.shape) == 2 and tensor.endswith(WEIGHT) and min(entry.shape) >= LEAST_SIDE:
            found[module] = tensor, (entry.shape[0], entry.shape[1]), None
        else:
            left[module] = f"no matrix of {LEAST_SIDE} rows and columns or more"
    return found, left


def left_alone(module: str, layers: int | None) -> str | None:
    """The reason why a module's weight stays as it is, by its full name; None: it is a linear like any other.

    layers   decoder layers of the model: one that is counted on after the last is of multi-token prediction
    """
    part = part_left_alone(module)
    if part is not None:
        return part
    layer = LAYER.search(module + ".")
    if layer is not None and layers is not None and int(layer[1]) >= layers:
        return "blocks that predict further tokens"
    return None


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a configuration that describes the language model; of a text model, all of it."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return part
    return config


def is_head(module: str) -> bool:
    """True if a module of that name is the output head."""
    parts = module.split(".")
    return parts[-1] in HEADS and (parts[-1] != "output" or len(parts) == 1)


def has_head(tensors: Collection[str]) -> bool:
    """True if a checkpoint with tensors of these names has an output head of its own."""
    return any(is_head(name.removesuffix(WEIGHT)) for name in tensors)


def is_embeddings(module: str) -> bool:
    """True if a module of that name is the matrix that token ids pick rows of."""
    parent, _, name = module.rpartition(".")
    return name in EMBEDDINGS and LAYER.search(module) is None and part_left_alone(parent) is None


def embeddings_tensor(tensors: Collection[str]) -> str | None:
    """The stored matrix of embeddings; None where no name, or more than one, is known to be it."""
    found = [name for name in tensors if name.endswith(WEIGHT) and is_embeddings(name.removesuffix(WEIGHT))]
    return found[0] if len(found) == 1 else None


def seen_tensors(tensors: Mapping[str, TensorShape], spec: WeightSpec) -> Mapping[str, TensorShape]:
    """The tensors with a head besides, where that alone is to be quantized and is the embeddings."""
    embeddings = embeddings_tensor(tensors)
    if not unties(spec) or has_head(tensors) or embeddings is None:
        return tensors
    return {**tensors, HEAD_TENSOR: tensors[embeddings]}


def _of_experts(module: str) -> bool:
    return any("experts" in part for part in module.split(".")) and _projection(module) in (*IN_ORDER, *OUT_ORDER)


def _projection(module: str) -> str:
    return module.rpartition(".")[2]


def _experts(tensor: str, shape: tuple[int, ...], text: Mapping[str, object]) -> Iterator[tuple[str, Candidate]]:
    """Every expert's linears in a 3-D tensor: (experts, out, in), or (experts, in, out) as gpt-oss and Llama 4 have it.

    The model's width tells the two apart; none are given where both sides are as wide.
    """
    module, hidden = tensor.removesuffix(WEIGHT), text.get("hidden_size")
    count, rows, columns = shape
    if (rows == hidden) == (columns == hidden):
        return
    reads = _projection(module) in IN_ORDER
    transposed = rows == hidden if reads else columns == hidden
    out, width = (columns, rows) if transposed else (rows, columns)
    parent, _, projection = module.rpartition(".")
    names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    interleaved = str(text.get("model_type")) in INTERLEAVED
    if out % len(names) or min(out // len(names), width) < LEAST_SIDE:
        return
    for expert in range(count):
        for part, name in enumerate(names):
            step = len(names) if interleaved else 1
            first = part if interleaved else part * (out // len(names))
            place = ExpertPlace(expert, first, step, transposed)
            yield f"{parent}.{expert}.{name}", (tensor, (out // len(names), width), place)
