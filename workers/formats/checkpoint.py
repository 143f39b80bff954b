"""Writer of a safetensors checkpoint folder, block by block: quantized linears as they come, the rest from the source.

Unquantized tensors (embeddings, norms, biases, the head) are copied bit by bit unless `add_tensor` replaced it, and
so are the tokenizer, the generation configuration, the chat template and the licence. Code from the source (`*.py`)
is never copied, and neither are the names by which its configurations call that code.
"""

import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from app.domain.format_rules import holds_base_alone
from app.domain.methods import Scheme
from bitwright.errors import InternalError
from bitwright.report import Report
from workers.contracts.input_squares import InputSquares
from workers.contracts.kv_cache import KVScales
from workers.formats.cards.loading import AdapterBase, Lines
from workers.formats.cards.model_card import describe
from workers.formats.format import Compress, Decompress, Format, Opening
from workers.formats.fused_linears import NumbersInCommon
from workers.formats.shards import Pieces, ShardWriter, write_json
from workers.formats.source_files import check_tensor, copy_files, without_code
from workers.formats.stored_linear import StoredLinear, StoredPart
from workers.formats.written_part import WrittenPart
from workers.numerics.quantized import LinearResult

LOADER = Path(__file__).with_name("load_bitwright.py")
"""Copied into every checkpoint that stock loaders do not load."""


@dataclass(frozen=True)
class Layout:
    """The parts in which formats of safetensors differ.

    compress       name of a linear, its result -> its stored tensors, by full name
    stem           first part of the weight files' names: `model` if `from_pretrained` loads them, another one where it
                   shall say that it finds no weights rather than fill them at random
    one_file       whether the weights are one file, held in memory until it is written, whatever the model's size
    config         schemes by module name, module names of the other linears -> fields added to config.json
    files          linears and parts by name in the checkpoint -> content of further JSON files, by name
    needs_loader   whether the one-file loader is added
    loader         that file
    warnings       code and message of requirements for loading, of the linears' schemes and outputs by name
    moved          name of a linear, its result -> how far rounding what stands for zero points moves weights, at
                   most, in steps of a scale; 0 where nothing is rounded
    embeddings     the fields of `config` -> those of a checkpoint whose embeddings are quantized; None: the same
    in_common      numbers of a linear, by name, that those which runtimes run as one with it must have, too
    joins          whether parts of a tensor of the source are put together again, in the source's layout
    kv_cache       name of an attention, its scales -> their stored tensors; None: they are left out
    kv_config      config.json's fields -> what is added to them if there are such scales
    inputs         file of the sums of linears' squared inputs, for other formats later; None: they are left out
    """

    compress: Compress
    stem: str = "model"
    one_file: bool = False
    config: Callable[[Mapping[str, Scheme], Collection[str]], Mapping[str, object]] | None = None
    files: Callable[[Mapping[str, StoredLinear], Mapping[str, StoredPart]], Mapping[str, object]] | None = None
    needs_loader: Callable[[Mapping[str, Scheme]], bool] | None = None
    warnings: Callable[[Mapping[str, Scheme], Mapping[str, int]], Mapping[str, str]] | None = None
    in_common: Callable[[LinearResult], Mapping[str, float]] | None = None
    moved: Callable[[str, LinearResult], float] | None = None
    embeddings: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None
    joins: bool = False
    loader: Path = LOADER
    kv_cache: Callable[[str, KVScales], dict[str, Tensor]] | None = None
    kv_config: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None
    inputs: str | None = None


def checkpoint_format(
    layout: Layout,
    loading: Lines,
    adapter_base: Callable[[Mapping[str, Scheme]], AdapterBase] | None = None,
    decompress: Decompress | None = None,
) -> Format:
    """A format whose checkpoints have this layout; the others as in `Format`."""
    writer = partial(CheckpointWriter, layout, loading)
    return Format(writer, loading, layout.compress, decompress, adapter_base)


@dataclass(frozen=True)
class _Sealed:
    """Names of tensors of the source, and of linears, that are in parts."""

    tensors: frozenset[str] = frozenset()
    linears: frozenset[str] = frozenset()


class CheckpointWriter:
    """One checkpoint in one format."""

    def __init__(self, layout: Layout, loading: Lines, folder: Path, opening: Opening) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._layout, self._loading, self._folder, self._opening = layout, loading, folder, opening
        self._source = opening.source
        if opening.parts is not None:
            opening.parts.mkdir(parents=True, exist_ok=True)
        limits = (sys.maxsize, sys.maxsize) if layout.one_file else (opening.shard_bytes, opening.held_bytes)
        self._shards = ShardWriter(folder, layout.stem, limits[0], held_bytes=limits[1], parts=opening.parts)
        self._linears: dict[str, StoredLinear] = {}
        self._parts: dict[str, StoredPart] = {}
        self._wholes: dict[str, tuple[Tensor, int]] = {}
        self._modules: dict[str, str] = {}
        self._written: set[str] = set()
        self._moved = 0.0
        self._attentions: list[str] = []
        self._inputs: dict[str, Tensor] = {}
        self._sealed = _Sealed()
        self._in_common = NumbersInCommon()

    def add_linear(
        self, name: str, result: LinearResult, *, module: str | None = None, part: StoredPart | None = None
    ) -> None:
        """Store a quantized linear.

        name      of the linear in the source checkpoint, without `.weight`; its tensors get the same name
        module    its name in the transformers model, where that differs
        part      its place in a tensor of the source, where it has none of that name and shape

        Raises:
            FormatCannotHold: the format would have to change the weight.
        """
        holder = f"{name}.weight" if part is None else part.of
        if holder not in self._source.tensors:
            raise InternalError(f"the source checkpoint has no tensor {holder}", field=name)
        if holds_base_alone(self._opening.name, self._opening.formats):
            result = LinearResult(result.weight)
        tensors = self._layout.compress(name, result)
        if self._layout.moved is not None:
            self._moved = max(self._moved, self._layout.moved(name, result))
        if self._layout.in_common is not None:
            self._in_common.check(name, self._layout.in_common(result))
        if part is not None and self._layout.joins:
            self._put(part, tensors[f"{name}.weight"])
        else:
            self._shards.add(tensors)
        if part is not None:
            self._parts[name] = part
        self._linears[name] = StoredLinear.of(result)
        self._modules[name] = module or name
        self._written.add(holder)

    def add_part(self, name: str, tensor: Tensor, part: StoredPart) -> None:
        """Store the weight of a linear that is not quantized, but lies in one tensor with linears that are."""
        if self._layout.joins:
            self._put(part, tensor)
        else:
            self._shards.add({f"{name}.weight": tensor.contiguous()})
        self._parts[name] = part
        self._written.add(part.of)

    def _put(self, part: StoredPart, value: Tensor) -> None:
        """A part into its tensor, which is stored when all of it is there."""
        shape = tuple(self._source.tensors[part.of].shape)
        whole, left = self._wholes.get(part.of) or (torch.empty(shape, dtype=value.dtype), prod(shape))
        part.view(whole).copy_(value)
        self._wholes[part.of] = (whole, left - value.numel())
        if left == value.numel():
            self._shards.add({part.of: self._wholes.pop(part.of)[0]})

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        check_tensor(self._source, name, tensor)
        self._shards.add({name: tensor})
        self._written.add(name)

    def add_kv_scales(self, attention: str, scales: KVScales) -> None:
        """Store the scales of an attention's key-value cache, where the layout has them."""
        if self._layout.kv_cache is not None:
            self._shards.add(self._layout.kv_cache(attention, scales))
            self._attentions.append(attention)

    def add_inputs(self, name: str, squares: InputSquares) -> None:
        """Keep the sums of a linear's squared inputs, where the layout has a file of them."""
        if self._layout.inputs is not None:
            self._inputs |= squares.tensors(name)

    @contextmanager
    def growing(self, name: str, dtype: torch.dtype) -> Iterator[Pieces]:
        """A tensor in place of the source's of that name and shape, which comes in pieces."""
        with self._shards.growing(name, dtype, tuple(self._source.tensors[name].shape)) as pieces:
            yield pieces
        self._written.add(name)

    def seal(self) -> WrittenPart:
        """Make everything durable that was added since the last time; where parts have a folder, it can be adopted."""
        sealed = self._sealed
        part = WrittenPart(
            shards=self._shards.seal(),
            tensors=tuple(sorted(self._written - sealed.tensors)),
            linears={name: linear for name, linear in self._linears.items() if name not in sealed.linears},
            parts={name: place for name, place in self._parts.items() if name not in sealed.linears},
        )
        self._sealed = self._as_sealed()
        return part

    def _as_sealed(self) -> "_Sealed":
        return _Sealed(frozenset(self._written), frozenset([*self._linears, *self._parts]))

    def holds(self, part: WrittenPart) -> bool:
        """True if all shards of a part lie in the folder of parts as they were sealed."""
        return all(self._shards.holds(shard) for shard in part.shards)

    def adopt(self, part: WrittenPart) -> None:
        """Go on after a part that an earlier writer has sealed, as if this one had."""
        self._shards.adopt(part.shards)
        self._linears |= part.linears
        self._modules |= {name: name for name in part.linears}
        self._parts |= part.parts
        self._written |= set(part.tensors)
        self._sealed = self._as_sealed()

    def abandon(self) -> None:
        """Let go of open files of a checkpoint that will not be finished."""
        self._shards.abandon()

    def finish(self, *, ignored: Collection[str] = ()) -> None:
        """Copy the rest of the checkpoint and write its configuration.

        ignored   module names of linears that stay as they are; those that the source's tensors show are added
        """
        if self._wholes:
            raise InternalError(f"parts of {next(iter(self._wholes))} are missing", field=next(iter(self._wholes)))
        for name in self._source.tensors:
            if name not in self._written:
                self._shards.add({name: self._source.read(name)})
        self._shards.finish()
        if self._layout.inputs is not None and self._inputs:
            save_file(self._inputs, self._folder / self._layout.inputs)
        self._write_config(sorted({*ignored, *self._unquantized_matrices()} - self._targets().keys()))
        copy_files(self._source.folder, self._folder)

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        return describe(self._folder, report, self._linears, self._opening, self._loading, self._outputs())

    @property
    def warnings(self) -> Mapping[str, str]:
        """Requirements for loading, and how far rounded offsets move weights."""
        found = {} if self._layout.warnings is None else dict(self._layout.warnings(self._schemes(), self._outputs()))
        if self._moved:
            name, moved = self._opening.name.value, f"at most {self._moved:.3g} of a group's step"
            text = f"{name} stores offsets in place of zero points, rounded to the model's dtype: {moved}"
            found[f"{name}_offsets_rounded"] = text
        return found

    def _unquantized_matrices(self) -> Iterable[str]:
        """Modules with a matrix that is not quantized: other linears, and embeddings, whose listing does no harm.

        A tied head has no tensor of its own, but it is a module of the class Linear.
        """
        yield "lm_head"
        for name in self._source.tensors:
            module = name.removesuffix(".weight")
            if module != name and len(self._source.tensors[name].shape) == 2:
                yield module

    def _write_config(self, ignored: list[str]) -> None:
        config = {**without_code(self._source.config), **self._dtype_fields()}
        if self._layout.config is not None:
            fields = self._layout.config(self._targets(), ignored)
            changed = self._layout.embeddings
            config |= fields if self._opening.embeddings is None or changed is None else changed(fields)
        if self._layout.kv_config is not None and self._attentions:
            config |= self._layout.kv_config(config)
        if self._layout.files is not None:
            for name, content in self._layout.files(self._linears, self._parts).items():
                write_json(self._folder / name, content)
        if self._layout.needs_loader is not None and self._layout.needs_loader(self._schemes()):
            shutil.copyfile(self._layout.loader, self._folder / self._layout.loader.name)
        write_json(self._folder / "config.json", config)

    def _schemes(self) -> dict[str, Scheme]:
        return {name: linear.scheme for name, linear in self._linears.items()}

    def _outputs(self) -> dict[str, int]:
        """out_features of the linears that are a matrix of the source, or a part of one."""
        tensors, own = self._source.tensors, {name: f"{name}.weight" for name in self._linears}
        matrices = {name: tensors[weight].shape[0] for name, weight in own.items() if weight in tensors}
        return matrices | {n: len(range(*part.rows)) for n, part in self._parts.items() if n in self._linears}

    def _targets(self) -> dict[str, Scheme]:
        """Schemes by module name, and also by name in the checkpoint if a runtime may use that."""
        return self._schemes() | {self._modules[name]: scheme for name, scheme in self._schemes().items()}

    def _dtype_fields(self) -> dict[str, str]:
        """Configuration fields with the dtype of the scales' rounding, which loaders must use by default."""
        dtypes = {linear.dtype for linear in self._linears.values()}
        if len(dtypes) != 1:
            return {}
        older = "torch_dtype" if "torch_dtype" in self._source.config else "dtype"
        return {"dtype": min(dtypes), older: min(dtypes)}
