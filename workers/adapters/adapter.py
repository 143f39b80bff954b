"""Interface of every adapter class: its size, its form in files, and its update as factors or per group."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from app.domain.adapters import AdapterSpec
from bitwright.errors import CorruptCheckpoint, InvalidRequest
from bitwright.report import BitOperations
from workers.contracts.adapters import TrainableAdapter
from workers.numerics.quantized import LinearResult, LowRank


class Adapter(TrainableAdapter, ABC):
    """A trainable update of one linear."""

    @classmethod
    @abstractmethod
    def beside(cls, spec: AdapterSpec, result: LinearResult, generator: torch.Generator) -> Self:
        """A new adapter for a quantized linear, on the device of its weight; random numbers come from `generator`.

        Raises:
            MisalignedAdapter: the kind does not fit the linear's shape or groups.
        """

    @classmethod
    def continued(cls, spec: AdapterSpec, low_rank: LowRank, name: str) -> Self:
        """The adapter that goes on from a method's factors beside the linear `name`.

        Raises:
            InvalidRequest: the kind cannot.
        """
        del low_rank
        raise InvalidRequest(
            f"{name} has low-rank factors, and a {spec.kind} cannot go on from them",
            field="adapter.kind",
            hint="take the kind lora, or a method that makes no factors",
        )

    def restore(self, trained: Mapping[str, Tensor], name: str) -> None:
        """Takes over the parameters of the base job's adapter of the linear `name`.

        Raises:
            CorruptCheckpoint: they are not those of this kind and shape.
        """
        wanted = {key: (tensor.shape, tensor.dtype) for key, tensor in self.state_dict().items()}
        if {key: (tensor.shape, tensor.dtype) for key, tensor in trained.items()} != wanted:
            raise CorruptCheckpoint(f"the base job's adapter of {name} has other tensors", field="base_job", value=name)
        self.load_state_dict(dict(trained))

    @property
    @abstractmethod
    def is_stock(self) -> bool:
        """True if its factors are a LoRA as stock peft has it."""

    @property
    @abstractmethod
    def inner_rank(self) -> int:
        """The rank of the pair, or the most that a single matrix can have."""

    @property
    @abstractmethod
    def stored_bits(self) -> int:
        """Bits of its numbers in the adapter file."""

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Multiplications and additions of a forward pass."""

    @abstractmethod
    def stored(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """Facts and host tensors for the adapter file (`workers.formats.adapter_file`); no tensors at rank 0."""

    @abstractmethod
    def low_rank(self, dtype: torch.dtype = torch.float32) -> LowRank | None:
        """The update as peft's factors, (rank, in) and (out, rank); None if no rank is left."""

    @abstractmethod
    def delta_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update as a dense matrix, (out, in)."""

    @abstractmethod
    def group_delta(self, group_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The update's one number per group of `group_size` columns (-1: a row), (out, groups).

        Raises:
            MisalignedAdapter: it varies within a group.
            InternalError: the kind merges in floating point alone, and the request should have been refused.
        """

    @classmethod
    def bit_operations(cls, adapters: Mapping[str, Self], base_bits: Mapping[str, int]) -> BitOperations | None:
        """Report of the learned widths of adapters, by linear with the bits of its base; None for fixed widths."""
        del adapters, base_bits
        return None
