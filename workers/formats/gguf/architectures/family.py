"""The facts by which a model type's checkpoint becomes llama.cpp's: a row of data, or a small pure function.

Names are the source's after `workers.formats.gguf.architectures.names` has made them plain: without the prefixes of
wrappers, and with experts' numbers taken out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

Config = Mapping[str, Any]
"""Fields of a text model's configuration as transformers completes it, aliases included."""
Value = bool | int | float | str | list[bool] | list[int] | list[float]
Values = Mapping[str, Value]
"""Keys of the metadata, without the architecture's name -> values."""
Tensors = Mapping[str, Tensor]


def unmoved(name: str, config: Config) -> Tensor | None:
    """No order of rows but the source's."""
    del name, config
    return None


Rows = Tensor | slice


def whole(name: str, rows: int, config: Config) -> Sequence[tuple[str, Rows]] | None:
    """No parts: the tensor is one of the file's."""
    del name, rows, config
    return None


def unchanged(name: str, tensor: Tensor, config: Config) -> Tensor:
    """The tensor as the source has it."""
    del name, config
    return tensor


def no_name(config: Config) -> str | None:
    """No names."""
    del config
    return None


def nothing_derived(config: Config) -> Values:
    """No keys beside the ordinary ones."""
    del config
    return {}


@dataclass(frozen=True)
class Family:
    """A model type of transformers as llama.cpp's architecture.

    other      configuration -> llama.cpp's name of another architecture that such a model is of; None: the usual one
    keys       further keys of the metadata -> fields of the configuration; one that is None is left out
    derive     keys that follow from several fields
    epsilon    field of the norms' epsilon
    layer_norm whether norms subtract the mean
    aliases    regular expressions over the source's names, and what is put in their place first of all
    renames    regular expressions over plain names, and what is put in their place, where gguf's own map has no name
    order      name of a linear or its bias -> source's index of each row of the file, int64 (rows,); None: as they are
    split      name, rows -> names and rows of the several tensors of the file that a tensor of the source is
    change     numbers of an unquantized tensor that llama.cpp wants otherwise
    remakes    configuration -> regular expression of matrices whose columns move: no quantized block fits the file
    remake     the file's tensors by name, from such a matrix, fp32 (out, in)
    added      tensors that the source does not hold
    left_out   regular expression of the source's tensors that llama.cpp has no use for
    from_weights  keys that are numbers of the source's tensors: reads them by plain name
    transposed_experts  whether fused experts are stored (experts, in, out)
    alternating  whether rows of gate and up alternate in fused experts, else the gate's come first
    """

    other: Callable[[Config], str | None] = no_name
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    derive: Callable[[Config], Values] = nothing_derived
    epsilon: str = "rms_norm_eps"
    layer_norm: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    order: Callable[[str, Config], Tensor | None] = unmoved
    split: Callable[[str, int, Config], Sequence[tuple[str, Rows]] | None] = whole
    change: Callable[[str, Tensor, Config], Tensor] = unchanged
    remakes: Callable[[Config], str | None] = no_name
    remake: Callable[[str, Tensor, Config], Tensors] | None = None
    added: Callable[[Config], Tensors] | None = None
    left_out: str | None = None
    from_weights: Callable[[Config, Callable[[str], Tensor]], Values] | None = None
    transposed_experts: bool = False
    alternating: bool = False
