"""Prefetching the next block's weights while the current block is quantized."""

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from workers.engine.device.read_ahead import Upload, read_ahead
from workers.engine.device.side_stream import hand_over
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.activations import Activations
from workers.numerics.quantized import LinearResult

MakeResult = Callable[[str, LinearResult], LinearResult]


def _as_it_is(_: str, result: LinearResult) -> LinearResult:
    return result


@dataclass(frozen=True)
class ReadBlock:
    """Weights of a block on the device by full parameter name; whoever uses them takes them out.

    original    of all parameters
    quantized   those that replace them later: dequantized ones of quantized linears, and what changed with them;
                empty if the block is not finished
    """

    original: dict[str, Tensor]
    quantized: dict[str, Tensor]

    def hand_over(self) -> None:
        """To the calling thread."""
        for weights in (self.original, self.quantized):
            for name in weights:
                hand_over(weights[name])


class BlockReader:
    """Reads a model's blocks in order, each once, a block ahead. Close what it gives (`contextlib.closing`)."""

    def __init__(self, model: StreamedModel, finished: FinishedBlocks) -> None:
        self._model = model
        self._finished = finished
        self._upload = Upload(model.device) if model.device.type == "cuda" else None

    def blocks(self) -> Generator[ReadBlock, None, None]:
        """Original weights of all blocks, and quantized ones of those that `finished` held from the start.

        Raises:
            NumericalFailure: a weight is not finite.
        """

        def read(index: int) -> ReadBlock:
            quantized = self._quantized(index) if index < self._finished.resumed else {}
            return ReadBlock(self._read(index, {}), quantized)

        return self._each(read)

    def quantized_blocks(self, convert: MakeResult = _as_it_is) -> Generator[ReadBlock, None, None]:
        """Weights of all blocks, which must be finished: as they are quantized.

        convert   a linear's shipped result from its full name and its result on the host; called by the thread that
                  reads
        """
        return self._each(lambda index: ReadBlock(self._read(index, self._quantized(index, convert)), {}))

    def _each(self, read: Callable[[int], ReadBlock]) -> Generator[ReadBlock, None, None]:
        with closing(read_ahead(read, len(self._model.blocks), self._model.device)) as blocks:
            for block in blocks:
                block.hand_over()
                yield block

    def _read(self, index: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._model.read(self._model.layout.block(index), given, self._upload)

    def _quantized(self, index: int, convert: MakeResult = _as_it_is) -> dict[str, Tensor]:
        device, linears = self._model.device, self._finished.load(index)
        changed = {name: value.to(device) for name, value in self._finished.parameters(index).items()}
        weights = {f"{name}.weight": convert(name, result).to(device).dequantize() for name, result in linears.items()}
        return weights | changed


def replay_quantized(model: StreamedModel, finished: FinishedBlocks, activations: Activations) -> None:
    """X_q from the embeddings through all blocks again, with the weights that are durable now."""
    activations.rewind(model)
    with closing(BlockReader(model, finished).quantized_blocks()) as blocks:
        for index, block in enumerate(blocks):
            with model.filled(block.original):
                activations.advance_quantized(index, model.blocks[index])
