"""The `gguf` format: one file for llama.cpp and programs built on it, including the tokenizer and the architecture.

Quantized linears are GGML blocks with the method's codes and scales (`workers.formats.gguf.blocks`). Unquantized
tensors keep their numbers: matrices in the model's dtype, vectors in fp32. GGUF lists its tensors before their bytes,
so tensors that come block by block go to a file beside it first.
"""

import shutil
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from app.domain.format_rules import base_alone
from app.domain.methods import SCHEMES
from app.domain.methods.block_types import BlockType
from bitwright.errors import FormatCannotHold
from bitwright.report import Report
from workers.contracts.kv_cache import KVScales
from workers.formats.cards.model_card import describe
from workers.formats.format import Format, Opening
from workers.formats.gguf.blocks import compress, decompress, held, pack
from workers.formats.gguf.identity import add_identity
from workers.formats.gguf.loading import loading
from workers.formats.gguf.metadata import OTHER_FORMAT, Architecture
from workers.formats.gguf.read_back import read_back
from workers.formats.gguf.tokenizer import add_tokenizer, check_tokenizer
from workers.formats.source_files import LICENCES, SourceCheckpoint, check_tensor, copy_files
from workers.formats.stored_linear import StoredLinear, StoredPart
from workers.numerics.quantized import AffineWeight, BlockWeight, LinearResult

FILE = "model.gguf"
PLAIN: MappingProxyType[torch.dtype, Kind] = MappingProxyType(
    {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16, torch.float32: Kind.F32, torch.float64: Kind.F64}
)
TYPES: MappingProxyType[int, BlockType] = MappingProxyType(
    {row.blocks.number: row.blocks for row in SCHEMES.values() if row.blocks is not None}
)
"""The types of quantized tensors by their numbers."""


def check_source(source: SourceCheckpoint) -> None:
    """Check that the format can hold a model at all, before anything is computed.

    Raises:
        FormatCannotHold: its architecture or tokenizer is not supported.
    """
    check_tokenizer(source.folder, Architecture.of(source).dimensions.vocabulary)


class GGUFFile:
    """One GGUF file in a folder of its own."""

    def __init__(self, folder: Path, opening: Opening) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._opening, self._source = folder, opening, opening.source
        self._architecture = Architecture.of(opening.source)
        self._names = get_tensor_name_map(self._architecture.kind, self._architecture.dimensions.layers)
        self._linears: dict[str, StoredLinear] = {}
        self._stored = _Bytes(folder / "tensors.partial")
        self._kinds: Counter[int] = Counter()
        self._offset_error = 0.0

    def add_linear(
        self, name: str, result: LinearResult, *, module: str | None = None, part: StoredPart | None = None
    ) -> None:
        """Store a quantized linear; its low-rank correction goes into the `peft` checkpoint.

        Raises:
            FormatCannotHold: the format would have to change codes or scales, or has no name for the linear.
        """
        if part is not None:
            raise self._no_part(name)
        weight = result.weight
        alone = result.low_rank is None or base_alone(self._opening.formats)
        if not isinstance(weight, AffineWeight | BlockWeight) or not alone:
            raise FormatCannotHold(
                "gguf holds affine weights and llama.cpp's own types, without low-rank factors",
                field=name,
                hint='ask for formats: ["merged"], or add "peft" for the low-rank factors',
            )
        order = self._architecture.row_order(f"{name}.weight")
        packed = pack(name, weight)
        self._add(f"{name}.weight", packed.data if order is None else packed.data[order], packed.kind)
        self._linears[module or name] = StoredLinear.of(LinearResult(weight))
        self._kinds[packed.kind] += weight.codes.numel()
        self._offset_error = max(self._offset_error, packed.offset_error)

    def add_kv_scales(self, attention: str, scales: KVScales) -> None:
        """Does nothing: the format has no place for them."""

    def add_part(self, name: str, tensor: Tensor, part: StoredPart) -> None:
        """No tensor of the source becomes several.

        Raises:
            FormatCannotHold: always.
        """
        del tensor, part
        raise self._no_part(name)

    def _no_part(self, name: str) -> FormatCannotHold:
        detail = f"gguf has no tensor for {name}, a part of a larger one"
        return FormatCannotHold(detail, field=name, hint='ask for formats: ["merged"]')

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        check_tensor(self._source, name, tensor)
        self._add_plain(name, tensor)

    def finish(self, *, ignored: Collection[str] = ()) -> None:  # noqa: ARG002 - the source's tensors show them
        """Write the file: metadata, tokenizer, quantized linears, and the rest of the checkpoint."""
        for name in self._source.tensors:
            if name not in self._stored.names and not self._is_left_out(name):
                self._add_plain(name, self._source.read(name))
        factors = self._architecture.rotary_factors()
        if factors is not None:
            self._stored.add("rope_freqs.weight", _as_bytes(factors), Kind.F32)
        writer = GGUFWriter(self._folder / FILE, self._architecture.name)
        add_identity(writer, self._source, self._opening.identity, base_alone(self._opening.formats))
        self._architecture.add_to(writer)
        add_tokenizer(writer, self._source.folder, self._architecture.dimensions.vocabulary)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(TYPES[self._kinds.most_common(1)[0][0]].file_type)
        self._stored.write(writer)
        copy_files(self._source.folder, self._folder, LICENCES)

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        reading = read_back(self._folder, FILE, self._architecture.config, self._source.folder)
        return describe(self._folder, report, self._linears, self._opening, partial(loading, reading=reading))

    @property
    def warnings(self) -> dict[str, str]:
        """Code and message of each warning for the caller, after the last linear."""
        if not self._offset_error:
            return {}
        moved = f"at most {self._offset_error:.3g} of a group's step"
        return {"gguf_offsets_rounded": f"gguf stores offsets in place of zero points, rounded to fp16: {moved}"}

    def _is_left_out(self, name: str) -> bool:
        """True for rotary frequencies, which are computed, and for a head that is the embedding matrix."""
        head = self._architecture.dimensions.tied_embeddings and name == "lm_head.weight"
        return head or name.endswith("rotary_emb.inv_freq")

    def _add_plain(self, name: str, tensor: Tensor) -> None:
        order = self._architecture.row_order(name)
        tensor = tensor if order is None else tensor[order]
        tensor = tensor.float() if tensor.ndim == 1 else tensor
        self._add(name, _as_bytes(tensor), PLAIN[tensor.dtype])

    def _add(self, name: str, data: Tensor, kind: int) -> None:
        gguf_name = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            detail = f"gguf has no name for the tensor {name}"
            raise FormatCannotHold(detail, field="formats", value=name, hint=OTHER_FORMAT)
        self._stored.add(gguf_name, data, kind, source=name)


class _Bytes:
    """Tensors on disk in the order in which they came, until the file's list of tensors can be written."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._size = 0
        self._entries: list[tuple[str, int, int, tuple[int, ...]]] = []
        self.names: set[str] = set()

    def add(self, name: str, data: Tensor, kind: int, *, source: str | None = None) -> None:
        """Append `data`, uint8 (..., bytes per row); `source` is the tensor's name in the source checkpoint."""
        self._entries.append((name, kind, self._size, tuple(data.shape)))
        with self._file.open("ab") as stream:
            data.contiguous().numpy().tofile(stream)
        self._size += data.numel()
        self.names.add(source or name)

    def write(self, writer: GGUFWriter) -> None:
        """Write the complete GGUF file; removes the collected bytes."""
        for name, kind, offset, shape in self._entries:
            data = np.memmap(self._file, dtype=np.uint8, mode="r", offset=offset, shape=shape)
            _add_tensor(writer, name, data, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._file.unlink()


def _add_tensor(writer: GGUFWriter, name: str, data: "np.memmap[Any, Any]", kind: int) -> None:
    """Add rows of bytes; of a type that the package does not know yet, it is told their shape in weights."""
    if kind in GGML_QUANT_SIZES:
        writer.add_tensor(name, data, raw_dtype=Kind(kind))
        return
    shape = (*data.shape[:-1], data.shape[-1] // TYPES[kind].size * TYPES[kind].weights)
    writer.add_tensor(name, data.view(np.int8), raw_shape=shape, raw_dtype=kind)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as uint8 (..., bytes per row)."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)


FORMAT = Format(GGUFFile, loading, compress, decompress, check_source=check_source, held=held)
