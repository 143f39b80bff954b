"""Finished blocks on disk, so that a killed attempt costs at most the block in hand and the one being written.

    state/state.json             {"fingerprint": ..., "blocks": [{"index", "file", "sha256", "report"}, ...]}
    state/block-00000.safetensors  the block's linears as in the native format, described in the header, and other
                                 parameters that changed
    state/embeddings.safetensors   the matrix of embeddings in the same way, where it is quantized
    state/scales.safetensors     scales that were tuned end to end, by full linear name; in place of the blocks' own. Of
                                 llama.cpp's types, by that name and the tensor's.
                                 Norms that were tuned with them, by full parameter name
    state/tuned-00000.safetensors  a block's linears in place of those of its shard, where codes were tuned with them

A block's shard is durable before state.json names it, and state.json is replaced whole. An attempt adopts them
only under its own fingerprint (request, model files, calibration tokens, code, plan), only in order from block 0, and
only shards whose hash matches. Scales tuned end to end belong to all blocks, and are adopted only with all of them.

Of several processes, which all make the same weights, the first writes and the others read what it wrote; all of them
adopt the same blocks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from app.domain.inputs.safetensors_header import LENGTH_BYTES
from bitwright.report import BlockReport, ScaleReport
from workers.contracts.input_squares import InputSquares
from workers.contracts.kv_cache import KVScales
from workers.disk.durable import replace_file
from workers.engine.device.process_group import SINGLE_PROCESS, ProcessGroup
from workers.formats import native
from workers.formats.stored_linear import StoredLinear
from workers.numerics.quantized import AffineWeight, BlockWeight, FloatWeight, LinearResult

LINEARS = TypeAdapter(dict[str, StoredLinear])
"""Descriptions of linears in a shard's header, by full name."""


class FinishedBlock(BaseModel):
    """A durable block; `report` is None for the head, which is no block.

    parameters   names of the file's tensors that are not of quantized linears
    caches       full names of attentions whose scales of a key-value cache are in it
    inputs       full names of linears whose sums of squared inputs are in it
    """

    model_config = ConfigDict(frozen=True)

    index: int
    file: str
    sha256: str
    report: BlockReport | None
    parameters: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


class FinishedLinears(BaseModel):
    """A durable file of linears: the matrix of embeddings, or those of a block."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str


class FinishedScales(BaseModel):
    """The durable result of tuning scales end to end; no scales in the file if the old ones stayed.

    parameters   by block: names of the file's tensors that are others, tuned along, in place of the block's own
    linears      by block: files of its linears, in place of the block's own, where codes were tuned along
    """

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str
    report: ScaleReport
    parameters: dict[int, tuple[str, ...]] = {}
    linears: dict[int, FinishedLinears] = {}


class StateFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    fingerprint: str
    embeddings: FinishedLinears | None = None
    blocks: tuple[FinishedBlock, ...] = ()
    scales: FinishedScales | None = None


@dataclass(frozen=True)
class Shard:
    """A durable file in the state folder, its sha256, and which of its tensors are not of quantized linears.

    parameters, caches, inputs   as in `FinishedBlock`
    """

    file: str
    sha256: str
    parameters: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


class FinishedBlocks:
    """The state folder of a workspace, held by one attempt; each of its processes has one of these.

    In any process but the first, saving only notes what is saved: it is there for `load` after `settle`.

    resumed   how many blocks an earlier attempt had finished
    """

    def __init__(self, folder: Path, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._processes = processes
        self._state = StateFile(fingerprint="")
        self._scales: dict[str, Tensor] = {}
        self.resumed = 0

    def adopt(self, fingerprint: str) -> None:
        """Takes over the blocks that an earlier attempt finished under this fingerprint; all processes at once."""
        self._state = self._agreed(self._sound(fingerprint))
        self._scales = {} if self._state.scales is None else load(self._read(self._state.scales.file))
        self.resumed = len(self._state.blocks)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decided the codes."""
        return self._state.fingerprint

    @property
    def blocks(self) -> tuple[FinishedBlock, ...]:
        return self._state.blocks

    @property
    def scales(self) -> ScaleReport | None:
        """The report of the stage that tunes scales end to end, if it is done."""
        return None if self._state.scales is None else self._state.scales.report

    @property
    def embeddings(self) -> FinishedLinears | None:
        """The file of the quantized embeddings, once they are durable."""
        return self._state.embeddings

    def save_embeddings(self, name: str, result: LinearResult) -> None:
        """Makes the quantized embeddings durable, before any block; `name` is the matrix's full module name."""
        shard = self._linears_file("embeddings.safetensors", {name: result})
        finished = FinishedLinears(file=shard.file, sha256=shard.sha256)
        self._replace_state(self._state.model_copy(update={"embeddings": finished}))

    def load_embeddings(self) -> dict[str, LinearResult]:
        """The quantized embeddings by full module name, on the host; empty where they are not quantized."""
        return {} if self.embeddings is None else self._linears_in(self.embeddings.file)

    def save(self, index: int, linears: Mapping[str, LinearResult], report: BlockReport | None) -> None:
        """Makes a block durable; `linears` by full name. Returns when a crash can no longer lose it."""
        self.finish(index, self.write_shard(index, linears), report)

    def write_shard(
        self,
        index: int,
        linears: Mapping[str, LinearResult],
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
        caches: Mapping[str, KVScales] = MappingProxyType({}),
        inputs: Mapping[str, InputSquares] = MappingProxyType({}),
    ) -> Shard:
        """A block's weights in a durable file that does not count before `finish`.

        linears     by full name
        parameters  others that changed with them, by full name
        caches      scales of key-value caches, by the attention's full name
        inputs      sums of the linears' squared inputs, by full name
        """
        return self._linears_file(f"block-{index:05d}.safetensors", linears, parameters, caches, inputs)

    def _linears_file(
        self,
        file: str,
        linears: Mapping[str, LinearResult],
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
        caches: Mapping[str, KVScales] = MappingProxyType({}),
        inputs: Mapping[str, InputSquares] = MappingProxyType({}),
    ) -> Shard:
        stored = {name: StoredLinear.of(result) for name, result in linears.items()}

        def tensors() -> dict[str, Tensor]:
            packed = [native.compress(name, result) for name, result in linears.items()]
            packed += [scales.tensors(name) for name, scales in caches.items()]
            packed += [squares.tensors(name) for name, squares in inputs.items()]
            return {key: tensor.cpu().contiguous() for named in (*packed, parameters) for key, tensor in named.items()}

        about = {"linears": LINEARS.dump_json(stored).decode()}
        shard = self._write(file, tensors, about)
        return replace(shard, parameters=tuple(parameters), caches=tuple(caches), inputs=tuple(inputs))

    def finish(self, index: int, shard: Shard, report: BlockReport | None) -> None:
        """Adopts the shard of the block after those that are finished. Returns when a crash can no longer lose it."""
        block = FinishedBlock(
            index=index,
            file=shard.file,
            sha256=shard.sha256,
            report=report,
            parameters=shard.parameters,
            caches=shard.caches,
            inputs=shard.inputs,
        )
        self._replace_state(self._state.model_copy(update={"blocks": (*self.blocks, block)}))

    def save_scales(
        self,
        scales: Mapping[str, Tensor],
        report: ScaleReport,
        parameters: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
        codes: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Makes durable what takes the place of the blocks' own: `load` and `parameters` then give it.

        scales       by full linear name
        parameters   others that were tuned along, by block and full name
        codes        that were, uint8 (out, in) by full linear name
        """
        linears = self._save_codes(codes) if codes else {}
        tensors = [*scales.items(), *(item for own in parameters.values() for item in own.items())]
        self._scales = {name: tensor.cpu().contiguous() for name, tensor in tensors}
        shard = self._write("scales.safetensors", lambda: self._scales, {})
        names = {index: tuple(own) for index, own in parameters.items()}
        finished = FinishedScales(
            file=shard.file, sha256=shard.sha256, report=report, parameters=names, linears=linears
        )
        self._replace_state(self._state.model_copy(update={"scales": finished}))

    def _save_codes(self, codes: Mapping[str, Tensor]) -> dict[int, FinishedLinears]:
        """Files of the blocks' linears with these codes, by block; those of before stay until the state says so."""
        files = {}
        for block in self.blocks:
            linears = self._linears_in(block.file)
            if not linears.keys() & codes.keys():
                continue
            moved = {name: with_codes(result, codes.get(name)) for name, result in linears.items()}
            shard = self._linears_file(f"tuned-{block.index:05d}.safetensors", moved)
            files[block.index] = FinishedLinears(file=shard.file, sha256=shard.sha256)
        return files

    def settle(self) -> None:
        """Returns once everything that any process has saved can be loaded by all of them."""
        self._processes.wait()

    def load(self, index: int) -> dict[str, LinearResult]:
        """The linears of a finished block by full name, on the host."""
        tuned = {} if self._state.scales is None else self._state.scales.linears
        return self._linears_in((tuned.get(index) or self.blocks[index]).file)

    def _linears_in(self, file: str) -> dict[str, LinearResult]:
        data = self._read(file)
        tensors, stored = load(data), described_linears(data)
        return {name: self._with_scale(name, native.decompress(name, tensors, stored[name])) for name in stored}

    def parameters(self, index: int) -> dict[str, Tensor]:
        """Other parameters that a finished block changed, by full name, on the host."""
        block = self.blocks[index]
        tensors = load(self._read(block.file)) if block.parameters else {}
        tuned = () if self._state.scales is None else self._state.scales.parameters.get(index, ())
        return {name: tensors[name] for name in block.parameters} | {name: self._scales[name] for name in tuned}

    def caches(self, index: int) -> dict[str, KVScales]:
        """Scales of key-value caches of a finished block, by the attention's full name, on the host."""
        block = self.blocks[index]
        tensors = load(self._read(block.file)) if block.caches else {}
        return {name: KVScales.read(name, tensors) for name in block.caches}

    def inputs(self, index: int) -> dict[str, InputSquares]:
        """Sums of squared inputs of a finished block's linears, by full name, on the host."""
        block = self.blocks[index]
        tensors = load(self._read(block.file)) if block.inputs else {}
        return {name: InputSquares.read(name, tensors) for name in block.inputs}

    def _with_scale(self, name: str, result: LinearResult) -> LinearResult:
        """The result with the scale that was tuned end to end, if there is one: weights of codebooks have none."""
        if isinstance(result.weight, BlockWeight):
            return replace(result, weight=self._with_tuned(name, result.weight))
        if name not in self._scales or not isinstance(result.weight, AffineWeight | FloatWeight):
            return result
        return replace(result, weight=replace(result.weight, scale=self._scales[name]))

    def _with_tuned(self, name: str, weight: BlockWeight) -> BlockWeight:
        """A weight in a type of llama.cpp's with all that was tuned of it."""
        return replace(
            weight,
            scale=self._scales.get(f"{name}.scale", weight.scale),
            scale_codes=self._scales.get(f"{name}.scale_codes", weight.scale_codes),
            minimum=self._scales.get(f"{name}.minimum", weight.minimum),
            minimum_codes=self._scales.get(f"{name}.minimum_codes", weight.minimum_codes),
        )

    def _write(self, file: str, tensors: Callable[[], dict[str, Tensor]], about: dict[str, str]) -> Shard:
        if not self._processes.leads:
            return Shard(file, "")
        data = save(tensors(), metadata=about or None)
        replace_file(self._folder / file, data)
        return Shard(file, hashlib.sha256(data).hexdigest())

    def _replace_state(self, state: StateFile) -> None:
        self._state = state
        if self._processes.leads:
            replace_file(self._folder / "state.json", state.model_dump_json().encode())

    def _read(self, file: str) -> bytes:
        return (self._folder / Path(file).name).read_bytes()

    def _sound(self, fingerprint: str) -> StateFile:
        empty = StateFile(fingerprint=fingerprint)
        try:
            state = StateFile.model_validate_json((self._folder / "state.json").read_bytes())
        except (OSError, ValidationError):
            return empty
        if state.fingerprint != fingerprint:
            return empty
        if state.embeddings is not None and not self._is_sound(state.embeddings):
            return empty  # X_q of every block began with them
        sound = []
        for position, block in enumerate(state.blocks):
            if block.index != position or not self._is_sound(block):
                break
            sound.append(block)
        scales = state.scales
        if scales is not None:
            tuned = self._is_sound(scales) and all(map(self._is_sound, scales.linears.values()))
            scales = scales if tuned and len(sound) == len(state.blocks) else None
        return StateFile(fingerprint=fingerprint, embeddings=state.embeddings, blocks=tuple(sound), scales=scales)

    def _agreed(self, state: StateFile) -> StateFile:
        """The part that every process reads; none goes on before all have looked, so none sees what another writes."""
        blocks = self._processes.least(len(state.blocks))
        scales = self._processes.least(int(state.scales is not None))
        embeddings = self._processes.least(int(state.embeddings is not None))
        return state.model_copy(
            update={
                "blocks": state.blocks[:blocks],
                "scales": state.scales if scales else None,
                "embeddings": state.embeddings if embeddings else None,
            }
        )

    def _is_sound(self, shard: FinishedBlock | FinishedScales | FinishedLinears) -> bool:
        try:
            data = self._read(shard.file)
        except OSError:
            return False
        return hashlib.sha256(data).hexdigest() == shard.sha256


def with_codes(result: LinearResult, codes: Tensor | None) -> LinearResult:
    """The result with other codes; None, or where codes have no scales: with its own."""
    if codes is None or not isinstance(result.weight, AffineWeight | FloatWeight):
        return result
    return replace(result, weight=replace(result.weight, codes=codes))


def described_linears(shard: bytes) -> dict[str, StoredLinear]:
    """Descriptions of linears in the header of a block's shard, by full name."""
    end = LENGTH_BYTES + int.from_bytes(shard[:LENGTH_BYTES], "little")
    return LINEARS.validate_json(json.loads(shard[LENGTH_BYTES:end])["__metadata__"]["linears"])
