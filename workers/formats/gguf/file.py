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

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from torch import Tensor

from app.domain.format_rules import base_alone
from bitwright.errors import FormatCannotHold
from bitwright.report import Report
from workers.contracts.input_squares import InputSquares
from workers.contracts.kv_cache import KVScales
from workers.formats.cards.model_card import describe
from workers.formats.format import Format, Opening
from workers.formats.gguf.blocks import compress, decompress, held, pack
from workers.formats.gguf.collected import TYPES, Collected
from workers.formats.gguf.identity import add_identity, add_recipe
from workers.formats.gguf.importance import FILE as IMPORTANCE
from workers.formats.gguf.importance import write_importance
from workers.formats.gguf.loading import ABOUT_IMPORTANCE, NO_IMPORTANCE, loading
from workers.formats.gguf.metadata import Architecture
from workers.formats.gguf.placed import PlacedTensors
from workers.formats.gguf.read_back import read_back
from workers.formats.gguf.tokenizer import add_tokenizer, check_tokenizer
from workers.formats.source_files import LICENCES, BlockSource, SourceCheckpoint, check_tensor, copy_files
from workers.formats.stored_linear import StoredLinear, StoredPart
from workers.numerics.quantized import AffineWeight, BlockWeight, LinearResult

FILE = "model.gguf"


def check_source(source: SourceCheckpoint) -> None:
    """Check that the format can hold a model at all, before anything is computed.

    Raises:
        FormatCannotHold: its architecture or tokenizer is not supported.
    """
    check_tokenizer(source.folder, Architecture.of(source).vocabulary)


class GGUFFile:
    """One GGUF file in a folder of its own."""

    def __init__(self, folder: Path, opening: Opening) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._opening, self._source = folder, opening, opening.source
        self._architecture = Architecture.of(opening.source)
        self._collected = Collected(folder / "tensors.partial")
        self._placed = PlacedTensors(self._architecture, self._collected)
        self._linears: dict[str, StoredLinear] = {}
        self._kinds: Counter[int] = Counter()
        self._offset_error = 0.0
        self._rows: dict[str, int] = {}
        self._inputs: dict[str, dict[int, InputSquares]] = {}
        self._tokens: tuple[str, ...] = ()

    def add_linear(
        self, name: str, result: LinearResult, *, module: str | None = None, part: StoredPart | None = None
    ) -> None:
        """Store a quantized linear; its low-rank correction goes into the `peft` checkpoint.

        Raises:
            FormatCannotHold: the format would have to change codes or scales, or has no name for the linear.
        """
        weight = result.weight
        alone = result.low_rank is None or base_alone(self._opening.formats)
        if not isinstance(weight, AffineWeight | BlockWeight) or not alone:
            raise FormatCannotHold(
                "gguf holds affine weights and llama.cpp's own types, without low-rank factors",
                field=name,
                hint='ask for formats: ["merged"], or add "peft" for the low-rank factors',
            )
        self._linears[module or name] = StoredLinear.of(LinearResult(weight))
        source = None if part is None else part.of
        if self._placed.is_remade(f"{name}.weight"):
            self._placed.add_dequantized(f"{name}.weight", weight.dequantize(), source)
            return
        packed = pack(name, weight)
        self._placed.add_rows(f"{name}.weight", packed.data, packed.kind, source)
        self._rows[name] = weight.shape[0]
        self._kinds[packed.kind] += weight.codes.numel()
        self._offset_error = max(self._offset_error, packed.offset_error)

    def add_kv_scales(self, attention: str, scales: KVScales) -> None:
        """Does nothing: the format has no place for them."""

    def add_inputs(self, name: str, squares: InputSquares) -> None:
        """Keep the sums of a linear's squared inputs, for the importance matrix beside the file."""
        for matrix, number in self._placed.matrices(f"{name}.weight", self._rows.get(name, 0)):
            self._inputs.setdefault(matrix, {})[number] = squares

    def add_part(self, name: str, tensor: Tensor, part: StoredPart) -> None:
        """Store an unquantized linear, (out, in), that lies in one tensor of the source with quantized ones.

        Raises:
            FormatCannotHold: the file has one tensor of one type for all of them.
        """
        self._placed.add_plain(f"{name}.weight", tensor, part.of)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that quantization changed in place of the source's tensor of that name and shape."""
        check_tensor(self._source, name, tensor)
        self._placed.add_plain(name, tensor)

    def finish(self, *, ignored: Collection[str] = ()) -> None:  # noqa: ARG002 - the source's tensors show them
        """Write the file: metadata, tokenizer, quantized linears, and the rest of the checkpoint."""
        for name in self._source.tensors:
            if name not in self._placed.done and not self._placed.is_left_out(name):
                self._add_untouched(name)
        writer = GGUFWriter(self._folder / FILE, self._architecture.name)
        add_identity(writer, self._source, self._opening.identity, base_alone(self._opening.formats))
        self._architecture.add_to(writer, self._source)
        self._tokens = add_tokenizer(writer, self._source.folder, self._architecture.vocabulary)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        most = self._kinds.most_common(1)
        add_recipe(writer, self._opening.identity, TYPES[most[0][0]].file_type if most else LlamaFileType.GUESSED)
        text = None if self._opening.identity is None else self._opening.identity.calibration
        if self._inputs and text is not None:
            write_importance(self._folder / IMPORTANCE, self._architecture.name, text, self._inputs)
        self._placed.add_made(self._source)
        self._collected.write(writer)
        copy_files(self._source.folder, self._folder, LICENCES)

    def _add_untouched(self, name: str) -> None:
        """A tensor that nothing was done to; of a GGUF file, its bytes."""
        source = self._source
        if not isinstance(source, BlockSource) or not self._placed.copy(name, source):
            self._placed.add_plain(name, source.read(name))

    def describe(self, report: Report) -> list[Path]:
        """Add the report and the model card, after `finish`; all files of the folder."""
        reading = read_back(self._folder, FILE, self._architecture.config, self._source.folder)
        tower = any(map(self._architecture.names.is_tower, self._source.tensors))
        lines = partial(loading, reading=reading, tower=tower, importance=self._about_importance())
        return describe(self._folder, report, self._linears, self._opening, lines)

    def _about_importance(self) -> str:
        """The card's words on the importance matrix."""
        if (self._folder / IMPORTANCE).is_file():
            return ABOUT_IMPORTANCE
        text = None if self._opening.identity is None else self._opening.identity.calibration
        why = "the job read no calibration text" if text is None else "the job kept no sums of squared inputs"
        return NO_IMPORTANCE.format(why=why)

    @property
    def warnings(self) -> dict[str, str]:
        """Code and message of each warning for the caller, after `finish`."""
        found: dict[str, str] = {}
        if self._offset_error:
            moved = f"at most {self._offset_error:.3g} of a group's step"
            found["gguf_offsets_rounded"] = f"gguf stores offsets in place of zero points, rounded to fp16: {moved}"
        if self._placed.whole:
            found["gguf_stored_whole"] = (
                f"gguf stores {len(self._placed.whole)} quantized linears in their own dtype, for llama.cpp has their "
                f"columns in another order: {self._placed.whole[0]} and others like it"
            )
        beside = [name for name in self._source.tensors if self._architecture.names.is_beside(name)]
        if beside:
            found["gguf_parts_left_out"] = (
                f"gguf holds the language model's own blocks: {len(beside)} tensors beside them are left out, as "
                f"{beside[0]}"
            )
        if self._tokens:
            found["gguf_tokens_differ"] = "gguf: " + "; ".join(self._tokens)
        return found


FORMAT = Format(GGUFFile, loading, compress, decompress, check_source=check_source, held=held)
