"""The result of the base job as the start of another: its blocks are taken over, not computed.

    native/bitwright.json, native/weights*.safetensors    linears bit for bit, and every other tensor of the model
    native/report.json                                    how far each linear was from the original when it was made,
                                                          and what was trained on it since
    adapter/adapter.safetensors                           trained parameters, of adapters that native does not hold

Every header is held against its file's size before a tensor is read. What a block has beside its linears is taken over
where it is not the model's own (norms with scales in them); outside the blocks it must be the model's own, or the model
has changed since.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.request.base_job import ADAPTER_FILE, DESCRIPTION, REPORT
from bitwright.errors import BitwrightError, CorruptCheckpoint
from bitwright.report import BaseTraining, BlockReport
from workers.contracts.kv_cache import KVScales
from workers.contracts.results import BlockResult
from workers.engine.model.checkpoint import MAX_JSON_BYTES, Checkpoint, StoredTensor, read_tensors
from workers.engine.model.streamed_model import StreamedModel
from workers.formats import native
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import LinearResult

HINT = "leave base_job out to quantize anew"
_LINEARS = TypeAdapter(dict[str, StoredLinear])
_BLOCKS = TypeAdapter(tuple[BlockReport, ...])
_TRAINING = TypeAdapter(tuple[BaseTraining, ...])


@dataclass(frozen=True)
class BaseJobResult:
    """Result of the base job, read when it is asked for.

    native     every tensor of its native checkpoint
    linears    what that says of quantized linears, by full module name
    adapters   trained parameters by full module name, where adapters are apart from the weights; empty otherwise
    blocks     reports of its blocks; empty where they cannot be read
    training   what it and those before it trained; empty where that cannot be read
    """

    model: StreamedModel
    native: Checkpoint
    linears: Mapping[str, StoredLinear]
    adapters: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    blocks: tuple[BlockReport, ...] = ()
    training: tuple[BaseTraining, ...] = ()

    @classmethod
    def open(cls, folder: Path, model: StreamedModel, quantized: set[str]) -> "BaseJobResult":
        """Reads descriptions and headers, and what lies outside the blocks.

        quantized   full names of the linears that the request's quantization names

        Raises:
            CorruptCheckpoint: files are missing or contradict each other, or the model has changed since.
        """
        with of_the_base():
            checkpoint = Checkpoint(folder / "native", {}, native_tensors(folder / "native"))
            stored = described(folder / "native" / DESCRIPTION)
            names = {model.names.linear_name(name): name for name in quantized}
            if names.keys() != stored.keys():
                other = min(names.keys() ^ stored.keys())
                raise CorruptCheckpoint(f"{DESCRIPTION} and the request differ in whether {other} is quantized")
            linears = {names[source]: linear for source, linear in stored.items()}
            file = folder / "adapter" / ADAPTER_FILE
            result = cls(
                model=model,
                native=checkpoint,
                linears=linears,
                adapters=_adapters(file) if file.exists() else {},
                blocks=_reports(folder / "native" / REPORT),
                training=_training(folder / "native" / REPORT),
            )
            result._demand_same_model()
            return result

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Of every quantized linear, by full name: those that a budget chose, too."""
        return {name: linear.scheme for name, linear in self.linears.items()}

    @property
    def continues(self) -> bool:
        """True if an adapter starts at values of the base job, trained ones or factors of its method."""
        return bool(self.adapters) or any(linear.low_rank is not None for linear in self.linears.values())

    def block(self, index: int) -> BlockResult:
        """A block's linears, and what changed with them, by their names inside it; on the host.

        Raises:
            CorruptCheckpoint: tensors are missing or do not fit.
        """
        prefix = self.model.layout.block(index) + "."
        with of_the_base():
            linears = {n.removeprefix(prefix): self.linear(n) for n in self.linears if n.startswith(prefix)}
            changed = {
                name.removeprefix(prefix): self.native.read(source).clone()
                for name, source in self.model.sources.items()
                if name.startswith(prefix) and not self._is_quantized(name) and not self._is_own(source)
            }
        return BlockResult(linears, parameters=changed)

    def linear(self, name: str) -> LinearResult:
        """One quantized linear by its full name, on the host, without factors that its adapter has taken over."""
        source = self.model.names.linear_name(name)
        with of_the_base():
            tensors = {key: self.native.read(key) for key in self._keys.get(source, ())}
            result = native.decompress(source, tensors, self.linears[name])
            linear = self.model.model.get_submodule(name)
            if result.weight.shape != tuple(linear.weight.shape):
                raise CorruptCheckpoint(f"{source} has the shape {result.weight.shape}, not that of the model")
        return replace(result, low_rank=None) if name in self.adapters else result

    def cache_scales(self, attention: str | None) -> KVScales | None:
        """Scales of an attention's key-value cache, by its full name; None where that job stored none."""
        source = None if attention is None else self.model.names.module_name(attention)
        keys = (
            []
            if source is None
            else [key for key in self._keys.get(source, ()) if key.endswith(("k_scale", "v_scale"))]
        )
        if source is None or not keys:
            return None
        with of_the_base():
            return KVScales.read(source, {key: self.native.read(key) for key in keys})

    def corrected(self, report: BlockReport) -> BlockReport:
        """The report of a block that was taken over: its linears' errors are those of the job that made them.

        Scales that a method moved between linears are not stored, so that they cannot be measured again.
        """
        base_job = {block.name: block.linears for block in self.blocks}
        return report.model_copy(update={"linears": base_job.get(report.name, report.linears)})

    @cached_property
    def _keys(self) -> Mapping[str, list[str]]:
        keys: dict[str, list[str]] = {}
        for key in self.native.tensors:
            keys.setdefault(key.rpartition(".")[0], []).append(key)
        return keys

    def _is_quantized(self, parameter: str) -> bool:
        name, _, leaf = parameter.rpartition(".")
        return leaf == "weight" and name in self.linears

    def _is_own(self, source: str) -> bool:
        """True if a tensor that is not quantized is that of the model, bit for bit."""
        if source not in self.native.tensors:
            raise CorruptCheckpoint(f"the tensor {source} is missing")
        stored, original = self.native.read(source), self.model.checkpoint.read(source)
        same = (stored.dtype, stored.shape) == (original.dtype, original.shape)
        return same and torch.equal(stored.flatten().view(torch.uint8), original.flatten().view(torch.uint8))

    def _demand_same_model(self) -> None:
        blocks = self.model.layout.blocks + "."
        for name, source in self.model.sources.items():
            if not name.startswith(blocks) and not self._is_quantized(name) and not self._is_own(source):
                raise CorruptCheckpoint(
                    f"the model's {source} is not the one that the base job had: the model has changed since",
                    hint=f"bring the model back as it was, or {HINT}",
                )


@contextmanager
def of_the_base() -> Iterator[None]:
    """Names the request's field `base_job` in errors about the base job's files."""
    try:
        yield
    except BitwrightError as error:
        error.field, error.hint = "base_job", HINT if error.hint == error.way_out else error.hint
        raise


def native_tensors(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("weights*.safetensors")):
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise CorruptCheckpoint(f"{name} is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = tensor
    return tensors


def described(file: Path) -> dict[str, StoredLinear]:
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"{file.name} is larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(file.read_bytes())
        if (content["format"], content["version"]) != ("bitwright", native.VERSION):
            raise CorruptCheckpoint(f"{file.name} is not of version {native.VERSION} of the native format")
        return _LINEARS.validate_python(content["linears"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        words = error.strerror if isinstance(error, OSError) else error  # without the path on this machine
        raise CorruptCheckpoint(f"{file.name} cannot be read: {words}") from error


def _reports(file: Path) -> tuple[BlockReport, ...]:
    """None where another version wrote them otherwise: they are reported, and decide nothing."""
    try:
        return _BLOCKS.validate_python(json.loads(file.read_bytes())["blocks"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError, RecursionError):
        return ()


def _training(file: Path) -> tuple[BaseTraining, ...]:
    """Adapters that the report says were trained; none where another version wrote it otherwise."""
    try:
        report = json.loads(file.read_bytes())
        before, finetuning, adapter = report.get("base_job") or {}, report.get("finetuning"), report.get("adapter")
        trainings = list(before.get("training", ()))
        if finetuning is not None and adapter is not None:
            trainings.append(
                {
                    "adapter": adapter["kind"],
                    "text": finetuning["text"],
                    "dataset_kind": finetuning.get("dataset_kind"),
                    "steps": finetuning["steps_kept"],
                    "folded": adapter.get("merge") is not None,
                }
            )
        return _TRAINING.validate_python(trainings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError):
        return ()


def _adapters(file: Path) -> dict[str, dict[str, Tensor]]:
    checkpoint = Checkpoint(file.parent, {}, read_tensors(file))
    adapters: dict[str, dict[str, Tensor]] = {}
    for key in checkpoint.tensors:
        name, _, parameter = key.rpartition(".")
        adapters.setdefault(name, {})[parameter] = checkpoint.read(key)
    return adapters
