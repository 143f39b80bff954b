"""Tensors of a source in their places in a file: rows in llama.cpp's order, parts apart, experts in stacks."""

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Protocol

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from bitwright.errors import FormatCannotHold
from workers.formats.gguf.architectures.names import FUSED
from workers.formats.gguf.metadata import OTHER_FORMAT, Architecture
from workers.formats.source_files import BlockSource

PLAIN: MappingProxyType[torch.dtype, Kind] = MappingProxyType(
    {torch.bfloat16: Kind.BF16, torch.float16: Kind.F16, torch.float32: Kind.F32, torch.float64: Kind.F64}
)
ALWAYS_FP32 = re.compile(
    r"_norm\.weight$|\.bias$|ffn_gate_inp|ssm_|shortconv\.conv|attn_sinks|exp_probs_b|position_embd|token_types"
)
"""Names of tensors that llama.cpp computes with in fp32 alone, whatever their shape."""
SSM_MATRICES = re.compile(r"ssm_(?:in|out|x|beta_alpha|alpha|beta)\.weight$")


class Collects(Protocol):
    """A place for the tensors of a file (`Collected`), or for their sizes alone."""

    def add(self, name: str, data: Tensor, kind: int, *, slot: int | None = None, of: int = 1) -> None: ...


class PlacedTensors:
    """The tensors of one file.

    done    names in the source of those that are there
    whole   names of quantized linears that are there in their own dtype
    """

    def __init__(self, architecture: Architecture, collected: Collects) -> None:
        self._architecture, self._family = architecture, architecture.family
        self._names, self._collected = architecture.names, collected
        self.done: set[str] = set()
        self.whole: list[str] = []

    def is_left_out(self, name: str) -> bool:
        """True for what a file does not hold: a head that is the embedding matrix, towers, computed numbers."""
        head = self._architecture.tied and self._names.plain(name) == "lm_head.weight"
        return head or self._names.is_left_out(name)

    def is_remade(self, name: str) -> bool:
        """True for a matrix whose columns move, so that blocks of it do not fit the file."""
        pattern = self._family.remakes(self._architecture.numbers)
        return pattern is not None and re.search(pattern, self._names.plain(name)) is not None

    def add_rows(self, name: str, data: Tensor, kind: int, source: str | None = None) -> None:
        """Store rows of bytes, uint8 (rows, bytes), of a tensor by its source's name.

        source   name of the source's tensor that holds it with others

        Raises:
            FormatCannotHold: llama.cpp has no name for it.
        """
        self.done.add(source or name)
        places = self._names.places(name, len(data))
        if places is None:
            detail = f"gguf has no name for the tensor {name}"
            raise FormatCannotHold(detail, field="formats", value=name, hint=OTHER_FORMAT)
        for place in places:
            self._collected.add(place.name, data[place.rows], kind, slot=place.slot, of=place.of)

    def matrices(self, name: str, rows: int) -> list[tuple[str, int]]:
        """Matrices of the file that hold a linear's rows, each with its number in a stack of them; none: no name."""
        return [(place.name, place.slot or 0) for place in self._names.places(name, rows) or ()]

    def add_dequantized(self, name: str, weight: Tensor, source: str | None = None) -> None:
        """Store a quantized matrix (out, in) whose columns move: its numbers, in its own dtype."""
        self.whole.append(name.removesuffix(".weight"))
        self._add_remade(name, weight, source)

    def _add_remade(self, name: str, weight: Tensor, source: str | None = None) -> None:
        self.done.add(source or name)
        assert self._family.remake is not None  # noqa: S101 - for the type checker: `is_remade` says so
        for made, tensor in self._family.remake(self._names.plain(name), weight, self._architecture.numbers).items():
            stem, dot, leaf = made.rpartition(".")
            found = self._names.find(stem, f"{dot}{leaf}")
            if found is None:
                raise FormatCannotHold(f"gguf has no name for the tensor {made}", field="formats", hint=OTHER_FORMAT)
            self._put(found, tensor)

    def add_plain(self, name: str, tensor: Tensor, source: str | None = None) -> None:
        """Store an unquantized tensor by its source's name."""
        self.done.add(source or name)
        if self.is_remade(name):
            self._add_remade(name, tensor, source)
            return
        if tensor.ndim >= 2 and FUSED.fullmatch(self._names.plain(name)):
            for part, own in self._fused(name, tensor):
                self._put(part, own)
            return
        changed = self._family.change(self._names.plain(name), tensor, self._architecture.numbers)
        places = self._names.places(name, len(changed) if changed.ndim else 1)
        if places is None:
            detail = f"gguf has no name for the tensor {name}"
            raise FormatCannotHold(detail, field="formats", value=name, hint=OTHER_FORMAT)
        for place in places:
            rows = changed[place.rows] if changed.ndim else changed
            self._put(place.name, rows, slot=place.slot, of=place.of)

    def copy(self, name: str, source: BlockSource) -> bool:
        """Store a tensor of a source that is a GGUF file, byte for byte; False where it has none for it as a whole."""
        stored, places = source.blocks(name), None
        if stored is not None:
            places = self._names.places(name, len(stored.data))
        if stored is None or places is None or len(places) != 1:
            return False
        self.done.add(name)
        place = places[0]
        self._collected.add(place.name, stored.data, stored.kind, slot=place.slot, of=place.of)
        return True

    def add_made(self, source: object) -> None:
        """Store the tensors that are made of no parameter: those of a `source` that is a GGUF file."""
        for name, tensor in self._architecture.added().items():
            stored = source.blocks(name) if isinstance(source, BlockSource) else None
            if stored is None:
                self._put(name, tensor)
            else:
                self._collected.add(name, stored.data, stored.kind)

    def _fused(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and numbers, (experts, out, in) or (experts, out), of the experts in one tensor of the source."""
        found = FUSED.fullmatch(self._names.plain(name))
        assert found is not None  # noqa: S101 - for the type checker: the caller looked
        leaf = ".bias" if found["leaf"] == "_bias" else ".weight"
        matrices = leaf == ".weight"
        if matrices and self._family.transposed_experts:
            tensor = tensor.transpose(1, 2)
        parts = {found["part"]: tensor}
        if found["part"] == "gate_up_proj":
            half = tensor.shape[1] // 2
            alternating = self._family.alternating
            gate, up = (tensor[:, ::2], tensor[:, 1::2]) if alternating else (tensor[:, :half], tensor[:, half:])
            parts = {"gate_proj": gate, "up_proj": up}
        for part, own in parts.items():
            placed = self._names.find(f"{found['before']}{part}", leaf)
            if placed is None:
                detail = f"gguf has no name for the tensor {name}"
                raise FormatCannotHold(detail, field="formats", value=name, hint=OTHER_FORMAT)
            yield placed, own

    def _put(self, name: str, tensor: Tensor, *, slot: int | None = None, of: int = 1) -> None:
        wide = tensor.ndim <= 1 or (ALWAYS_FP32.search(name) and not SSM_MATRICES.search(name))
        tensor = tensor.float() if wide and tensor.is_floating_point() else tensor
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        self._collected.add(name, _as_bytes(tensor), PLAIN[tensor.dtype], slot=slot, of=of)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as uint8 (..., bytes per row)."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8).flatten(-2)
