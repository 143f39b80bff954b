"""Groups of stored tensors and of the parameters that they become, converted both ways by transformers' own transforms.

A file may hold as one tensor what a model has as three, or as 256 what it has as one. `grouped` sorts the names of a
file as transformers does while it loads (`transformers.core_model_loading`), without a tensor being read.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Slice:
    """One matrix (out, in) inside a fused parameter.

    parameter   name of the fused one, (number, out, in) or (number, in, out); of a bias (number, out)
    index       along its first dimension
    rows        of all rows (out) of that matrix
    transposed  whether it is (in, out)
    """

    parameter: str
    index: int
    rows: slice
    transposed: bool = False

    def of(self, fused: Tensor) -> Tensor:
        """The view (out, in), or (out,) of a bias."""
        matrix = fused[self.index]
        return (matrix.T if self.transposed and matrix.ndim > 1 else matrix)[self.rows]

    def part(self, size: int) -> tuple[int, int] | None:
        """(which, of how many) equal runs of a matrix of `size` rows it is; None where it is none."""
        start, stop, step = self.rows.indices(size)
        length = stop - start
        fits = step == 1 and length > 0 and size % length == 0 and start % length == 0
        return (start // length, size // length) if fits and not self.transposed else None


@dataclass(frozen=True)
class Skeletal:
    """The model as far as a conversion asks for it.

    state        its parameters and buffers without memory
    _weight_conversions   the transforms that its file needed, under the name that transformers looks for
    converters   all that merge and cut, needed or not
    """

    config: Any
    state: Mapping[str, Tensor]
    _weight_conversions: Sequence[WeightTransform]
    converters: Sequence[WeightConverter] = ()

    def get_parameter(self, name: str) -> Tensor:
        """The parameter of that name.

        Raises:
            AttributeError: there is none, as `nn.Module.get_parameter` does.
        """
        if name not in self.state:
            raise AttributeError(name)
        return self.state[name]

    def alone(self, parameter: str) -> dict[tuple[int, object], str]:
        """Names of a fused parameter's parts in a file that has them one by one, by `Slice.index` and `Slice.part`.

        Empty where transformers merges no such file.
        """
        shape = self.state[parameter].shape
        needed = [t for t in self._weight_conversions if t not in self.converters]
        every = replace(self, _weight_conversions=[*needed, *self.converters])
        names = sorted(revert_weight_conversion(every, {parameter: self.state[parameter]}), key=dot_natural_key)
        if len(shape) != 3 or len(names) % shape[0] or len(names) == 1:
            return {}
        converter = next(c for c in map(copy.deepcopy, self.converters) if apply_converters(names[0], [c])[1])
        return _by_part(names, converter, shape[0])


@dataclass(frozen=True)
class Conversion:
    """Stored tensors and the parameters that they become.

    stored      a transform's pattern -> the stored names that it matched, 10 after 9
    parameters  names in the model; several where the file holds them as one
    converter   None: the one stored tensor is the one parameter as it is
    given       stored name by the name that transformers gives back, where they differ (a prefix that a file lacks)
    """

    stored: Mapping[str, tuple[str, ...]]
    parameters: tuple[str, ...]
    converter: WeightConverter | None = None
    given: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def names(self) -> tuple[str, ...]:
        """All stored names, each pattern's after another."""
        return tuple(name for names in self.stored.values() for name in names)

    def values(self, read: Read, model: Skeletal) -> dict[str, Tensor]:
        """The parameters from the stored tensors that `read` gives.

        Raises:
            RuntimeError, ValueError: their shapes do not fit each other.
        """
        if self.converter is None:
            return {self.parameters[0]: read(self.names[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.stored.items():
            for name in names:
                converter.add_tensor(self.parameters[0], name, pattern, read(name))
        found = converter.convert(self.parameters[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def back(
        self, values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], model: Any
    ) -> dict[str, Tensor]:
        """The stored tensors from the values of all its parameters, in the layout of the file.

        shapes   of the stored tensors: transformers does not undo a transposition that depends on shapes
        """
        if self.converter is None:
            return {self.names[0]: values[self.parameters[0]]}
        found = {self.given.get(n, n): v for n, v in revert_weight_conversion(model, dict(values)).items()}
        if any(isinstance(operation, Transpose) for operation in self.converter.operations):
            return {name: _turned(value, shapes.get(name, ())) for name, value in found.items()}
        return found

    def stored_part(self, piece: Slice, size: int) -> str | None:
        """Stored name of a matrix of its parameter, whose matrices have `size` rows; None where it is not by itself."""
        which = piece.part(size)
        if self.converter is None or which is None or which[1] != len(self.stored):
            return None
        steps = [(type(operation), getattr(operation, "dim", None)) for operation in self.converter.operations]
        if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        patterns = [pattern for pattern in self.converter.source_patterns if pattern in self.stored]
        return self.stored[patterns[which[0]]][piece.index]


@dataclass(frozen=True)
class Grouping:
    """All names of a file, sorted by what they become.

    conversions   one for each group
    doubled       pairs of stored names that would both be one parameter
    others        what fills nothing: stored name -> the name that transformers would give it
    """

    conversions: tuple[Conversion, ...]
    doubled: tuple[tuple[str, str, str], ...]
    others: Mapping[str, str]
    model: Skeletal


def grouped(model: PreTrainedModel, names: Sequence[str]) -> Grouping:
    """The stored names sorted into conversions, as transformers sorts them while it loads."""
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    joined: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    doubled, others = [], {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            others[name] = target
        elif pattern is not None:
            joined[target][pattern].append(name)
        elif target in plain:
            doubled.append((target, plain[target], name))
        else:
            plain[target] = name
    doubled += [(target, plain[target], next(iter(joined[target].values()))[0]) for target in joined if target in plain]
    found = [Conversion({name: (name,)}, (target,)) for target, name in plain.items()]
    for target, patterns in joined.items():
        converter = by_pattern[next(iter(patterns))]
        family = tuple(dict.fromkeys((target, *_family(target, converter))))
        found.append(Conversion({p: tuple(n) for p, n in patterns.items()}, family, converter))
    used = [transform for transform in transforms if transform.was_used()]
    return Grouping(tuple(found), tuple(doubled), others, Skeletal(model.config, state, used, converters))


def _by_part(names: Sequence[str], converter: WeightConverter, number: int) -> dict[tuple[int, object], str]:
    """Stored names by (number of the expert, (which, of how many parts))."""
    matched: dict[str, list[str]] = {pattern: [] for pattern in converter.source_patterns}
    for name in names:
        _, pattern = converter.rename_source_key(name)
        if pattern is not None:
            matched[pattern].append(name)
    lists = [found for found in matched.values() if found]
    if any(len(found) != number for found in lists):
        return {}
    return {(e, (k, len(lists))): name for k, found in enumerate(lists) for e, name in enumerate(found)}


def _family(target: str, converter: WeightConverter) -> list[str]:
    """All parameters of a converter that makes several, by the name of its first."""
    first, *others = converter.target_patterns
    return [target.replace(first, other) for other in (first, *others)] if first in target else []


def _turned(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor with its last dimensions exchanged where that is the shape, and it is not as it is."""
    fits = tuple(tensor.shape) != shape and tuple(tensor.transpose(-1, -2).shape) == shape
    return tensor.transpose(-1, -2).contiguous() if fits else tensor
