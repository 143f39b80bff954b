"""One tensor of the source: quantized and given to every writer, or given to them as it is."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.inputs.architectures import HEAD
from app.domain.methods import WeightSpec
from app.domain.weight_targets import ExpertPlace, KeptPart, Target, has_head, is_embeddings, is_head
from bitwright.errors import InternalError, NumericalFailure
from bitwright.report import LinearReport
from workers.contracts.blocks import TensorMethod
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.plan import scale_dtype_of
from workers.engine.quantize.block_report import error_sums
from workers.engine.quantize.registry import method_of
from workers.engine.stored_scales import StoredScales
from workers.engine.weights_only.finished_parts import FinishedLinear
from workers.formats.format import PartWriter
from workers.formats.stored_linear import StoredPart
from workers.numerics.floats.joined import shares_scale
from workers.numerics.quantized import LinearResult, StoredBits
from workers.numerics.row_parts import row_parts
from workers.numerics.searched_matrix import quantize_matrix


@dataclass(frozen=True)
class Done:
    """A tensor's linears as the report has them, and the bits that they take."""

    linears: tuple[FinishedLinear, ...] = ()
    bits: StoredBits = field(default_factory=StoredBits)


@dataclass(frozen=True)
class TensorPass:
    """Takes tensors of a checkpoint through a method and to writers, each by itself.

    linears   by the tensor that holds them: those that are quantized, and experts' that stay beside such
    joined    the linears that a runtime makes one matrix of with the one of that name, itself among them
    scales    those of each format
    """

    checkpoint: Checkpoint
    spec: WeightSpec
    formats: tuple[ExportFormat, ...]
    linears: Mapping[str, Sequence[Target | KeptPart]]
    joined: Callable[[str], Sequence[Target]] = lambda _: ()
    scales: StoredScales = field(default_factory=StoredScales)
    _amax: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def write(self, name: str, writers: Mapping[ExportFormat, PartWriter]) -> Done:
        """Store one tensor.

        Raises:
            NumericalFailure: a weight is not finite.
        """
        tensor, linears = self.checkpoint.read(name), self.linears.get(name, ())
        if not linears:
            for writer in writers.values():
                writer.add_tensor(name, tensor)
            return Done()
        first = linears[0]
        if isinstance(first, Target) and first.place is None:
            return self._matrix(first, tensor, writers)
        return self._experts(name, linears, tensor, writers)

    def _matrix(self, target: Target, weight: Tensor, writers: Mapping[ExportFormat, PartWriter]) -> Done:
        result, linear = self._quantized(target, weight)
        tied = is_embeddings(target.name) and not has_head(self.checkpoint.tensors)
        for export_format, writer in writers.items():
            stored = self.scales.of(export_format, target.name, result)
            writer.add_linear(target.name, stored)
            if tied and export_format.info.embeddings is EmbeddingRule.UNIFORM:
                writer.add_linear(HEAD, stored)
        return Done((linear,), result.stored_bits())

    def _experts(
        self,
        name: str,
        parts: Sequence[Target | KeptPart],
        tensor: Tensor,
        writers: Mapping[ExportFormat, PartWriter],
    ) -> Done:
        """A 3-D tensor, one expert after another: linears in packed formats, the same tensor in dense ones."""
        linears: list[FinishedLinear] = []
        bits = StoredBits()
        with ExitStack() as stack:
            growing = [
                stack.enter_context(writer.growing(name, tensor.dtype))
                for export_format, writer in writers.items()
                if export_format.info.dense
            ]
            packed = {name: writer for name, writer in writers.items() if not name.info.dense}
            for expert, weights in _by_expert(parts, tensor):
                whole = tensor[expert].clone() if growing else None
                for part, place, weight in weights:
                    stored: LinearResult | Tensor = weight
                    if isinstance(part, Target):
                        stored, linear = self._quantized(part, weight)
                        linears.append(linear)
                        bits += stored.stored_bits()
                        if whole is not None:
                            _outputs(whole, place, len(weight)).copy_(stored.dequantize())
                    stored_part = _stored_part(part, place)
                    for export_format, writer in packed.items():
                        if isinstance(stored, Tensor):
                            writer.add_part(part.name, stored, stored_part)
                        else:
                            own = self.scales.of(export_format, part.name, stored)
                            writer.add_linear(part.name, own, part=stored_part)
                for pieces in growing:
                    if whole is not None:
                        pieces.append(whole)
        return Done(tuple(linears), bits)

    def _quantized(self, target: Target, weight: Tensor) -> tuple[LinearResult, FinishedLinear]:
        started = time.perf_counter()
        demand_finite(target.name, weight)
        result = self._result(target, weight, scale_dtype_of(self.formats, weight.dtype))
        squared, reference = error_sums(result.dequantize(), weight, None).tolist()
        report = LinearReport(
            name=target.name,
            shape=target.shape,
            form=result.weight.form,
            **target.scheme.model_dump(exclude={"name"}),
            scheme=target.scheme.name,
            weight_error=math.sqrt(squared / reference) if reference else 0.0,
        )
        return result, FinishedLinear(report=report, seconds=time.perf_counter() - started)

    def _result(self, target: Target, weight: Tensor, scale_dtype: torch.dtype) -> LinearResult:
        """The linear by the spec's method; embeddings and head as in every job."""
        if is_embeddings(target.name) or (is_head(target.name) and self.spec.modules.head is not None):
            return LinearResult(quantize_matrix(weight, target.scheme, scale_dtype))
        method = method_of(self.spec)
        if not isinstance(method, TensorMethod):
            raise InternalError(f"{self.spec.method} needs a model", field="quantization.method")
        amax = self._joined_amax(target)
        result: LinearResult = method.quantize_tensor(weight, target.scheme, scale_dtype, self.spec, amax)
        return result

    def _joined_amax(self, target: Target) -> Tensor | None:
        """Largest magnitude of a linear and of all that a runtime joins with it; None where scales are its own.

        Each of the others' tensors is read once for it.
        """
        others = self.joined(target.name) if shares_scale(target.scheme) else ()
        if len(others) < 2:
            return None
        for other in others:
            if other.name not in self._amax:
                tensor = self.checkpoint.read(other.tensor)
                place = other.place
                own = tensor if place is None else _outputs(tensor[place.expert], place, other.shape[0])
                self._amax[other.name] = own.abs().max().float()
        return torch.stack([self._amax[other.name] for other in others]).max()


def demand_finite(name: str, weight: Tensor) -> None:
    """Check a linear's weight (out, in).

    Raises:
        NumericalFailure: it holds NaN or infinity.
    """
    for rows in row_parts(weight.shape[0], weight.shape[1], weight.device):
        if not math.isfinite(float(weight[rows].abs().max())):
            detail = f"the weight of {name} holds numbers that are not finite"
            hint = "take another checkpoint, or put the linear into modules.ignore"
            raise NumericalFailure(detail, field="model", value=name, hint=hint)


Piece = tuple[Target | KeptPart, ExpertPlace, Tensor]


def _by_expert(parts: Sequence[Target | KeptPart], tensor: Tensor) -> Iterator[tuple[int, list[Piece]]]:
    """Every expert with its linears (out, in), in the order of the tensor."""
    found: dict[int, list[tuple[Target | KeptPart, ExpertPlace]]] = {}
    for part in parts:
        if part.place is not None:
            found.setdefault(part.place.expert, []).append((part, part.place))
    for expert in range(len(tensor)):
        own = found.get(expert, [])
        yield expert, [(p, place, _outputs(tensor[expert], place, p.shape[0]).contiguous()) for p, place in own]


def _outputs(expert: Tensor, place: ExpertPlace, count: int) -> Tensor:
    """A linear's part (out, in) of an expert's matrix, in its memory."""
    outputs = expert.T if place.transposed else expert
    return outputs[place.first : place.first + place.step * count : place.step]


def _stored_part(part: Target | KeptPart, place: ExpertPlace) -> StoredPart:
    stop = place.first + place.step * part.shape[0]
    rows = (place.first, stop, place.step)
    return StoredPart(of=part.tensor, index=place.expert, rows=rows, transposed=place.transposed)
