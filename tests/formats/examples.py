"""Random results in every form and scheme, a report, and a tiny random Llama to write and to load."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from app.domain.formats import ExportFormat
from app.domain.methods import Form, Scheme
from bitwright.report import ModelReport, PeakMemory, Report, SizeReport
from workers.engine.stored_scales import StoredScales
from workers.formats.format import Writer
from workers.formats.gguf.block_bytes import decode
from workers.formats.registry import held, open_writer
from workers.numerics.floats.float_grids import quantize
from workers.numerics.normal_float import AbsmaxFormat, DoubleQuantization, codebook
from workers.numerics.quantized import (
    AffineWeight,
    CodebookWeight,
    LinearResult,
    LowRank,
    QuantizedAbsmax,
    QuantizedWeight,
)

TOKENS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(3))

REPORT = Report(
    version="0.1.0",
    method="rtn",
    seed=0,
    device="cpu",
    plan={"dtype": "bfloat16"},
    model=ModelReport(
        source="org/tiny", revision="abc", architecture="LlamaForCausalLM", dtype="bfloat16", parameters=70_000
    ),
    calibration=None,
    quality=None,
    blocks=(),
    size=SizeReport(
        bytes_original=140_000,
        bytes_quantized=40_000,
        quantized_weights=50_000,
        bits_per_weight=4.25,
        bits_per_weight_model=5.5,
    ),
    seconds={"total": 1.0},
    peak_memory=PeakMemory(host_bytes=1),
    blocks_computed=2,
    blocks_resumed=0,
)


def scheme(bits: int, group_size: int, symmetric: bool) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


@dataclass(frozen=True)
class Made:
    """A form that a method might make of a linear.

    absmax    how a codebook weight's maxima are stored
    offset    whether an affine weight has a fractional offset in place of its zero point
    rank      of the low-rank correction; 0: none
    """

    scheme: Scheme
    form: Form = Form.AFFINE
    absmax: AbsmaxFormat = torch.bfloat16
    offset: bool = False
    rank: int = 0
    alpha: float = 16.0
    factors: torch.dtype = torch.bfloat16


def codebook_made(bits: int, group_size: int, absmax: AbsmaxFormat = torch.bfloat16, rank: int = 0) -> Made:
    return Made(scheme(bits, group_size, True), Form.CODEBOOK, absmax, rank=rank)


def held_by(export_format: ExportFormat, rank: int = 0) -> list[Made]:
    """Results that the row of a format allows: every form with the symmetries and two of the widths.

    rank   of low-rank factors beside each of them
    """
    info = export_format.info
    size = 32 * info.group_multiple // gcd(32, info.group_multiple)
    made = [codebook_made(4, size, rank=rank)] if Form.CODEBOOK in info.kinds else []
    for symmetric in sorted(info.symmetries) if Form.AFFINE in info.kinds else ():
        widths = info.bits if symmetric or info.asymmetric_bits is None else info.asymmetric_bits
        made += [Made(scheme(bits, size, symmetric), rank=rank) for bits in {min(widths), max(widths)}]
    return made + [Made(each, each.form, rank=rank) for each in map(Scheme.named, sorted(info.schemes))]


def random_result(
    shape: tuple[int, int], made: Made | Scheme, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LinearResult:
    """Every code and zero point alike likely, scales of both signs, a correction about as large as a code's step."""
    made = made if isinstance(made, Made) else Made(made, made.form)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if made.form is Form.BLOCKS:
        return LinearResult(_block_weight(shape, made.scheme, dtype, generator), _low_rank(shape, made, generator))
    if made.form is Form.FLOAT:
        return LinearResult(_float_weight(shape, made.scheme, dtype, generator), _low_rank(shape, made, generator))
    groups = 1 if made.scheme.group_size == -1 else columns // made.scheme.group_size
    codes = torch.randint(0, 2**made.scheme.bits, shape, dtype=torch.uint8, generator=generator)
    scale = torch.randn(rows, groups, generator=generator) * 0.1
    make = _codebook_weight if made.form is Form.CODEBOOK else _affine_weight
    return LinearResult(make(codes, scale, made, dtype, generator), _low_rank(shape, made, generator))


def _affine_weight(
    codes: Tensor, scale: Tensor, made: Made, dtype: torch.dtype, generator: torch.Generator
) -> QuantizedWeight:
    bits, scale = made.scheme.bits, (scale / 2**made.scheme.bits).to(dtype)
    if made.offset:
        offset = torch.randn(scale.shape, generator=generator) * 0.1
        return AffineWeight(codes, scale, None, made.scheme, dtype, offset)
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator)
    return AffineWeight(codes, scale, None if made.scheme.symmetric else zero, made.scheme, dtype)


def _float_weight(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, generator: torch.Generator
) -> QuantizedWeight:
    """A random weight rounded: every bit pattern of a code is a number, but for e4m3's NaN.

    What runtimes want of linears that they run as one is the same of all.
    """
    weight = quantize(torch.randn(shape, generator=generator).to(dtype) * 0.1, scheme, dtype, torch.tensor(0.75))
    amax = torch.tensor([2.75]) if scheme.row is not None and scheme.row.calibrated else None
    return replace(weight, input_amax=amax)


def _block_weight(
    shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, generator: torch.Generator
) -> QuantizedWeight:
    """Random bytes in the scheme's type, or in the one that rows of so many columns fall back to; scales are small."""
    fitted = scheme.fitted(shape[1])
    assert fitted.blocks is not None
    size = shape[1] // fitted.blocks.weights * fitted.blocks.size
    weight = decode(torch.randint(0, 256, (shape[0], size), dtype=torch.uint8, generator=generator), fitted, dtype)
    small = (torch.randn(weight.scale.shape, generator=generator) * 0.001).half()
    return replace(weight, scale=small, minimum=None if weight.minimum is None else small.flip(0))


def _codebook_weight(
    codes: Tensor, scale: Tensor, made: Made, dtype: torch.dtype, generator: torch.Generator
) -> QuantizedWeight:
    absmax: Tensor | QuantizedAbsmax
    if isinstance(made.absmax, DoubleQuantization):
        to = made.absmax
        levels = torch.randint(0, 2**to.bits, scale.shape, dtype=torch.uint8, generator=generator)
        second = torch.rand(-(-scale.numel() // to.superblock), generator=generator).to(to.dtype) * 0.1
        absmax = QuantizedAbsmax(levels, second, torch.tensor(0.01), to.bits, to.superblock)
    else:
        absmax = scale.abs().to(made.absmax)
    return CodebookWeight(codes, codebook(made.scheme.bits), absmax, made.scheme, dtype)


def _low_rank(shape: tuple[int, int], made: Made, generator: torch.Generator) -> LowRank | None:
    if not made.rank:
        return None
    left, right = (torch.randn(s, generator=generator) * 0.1 for s in ((shape[0], made.rank), (made.rank, shape[1])))
    return LowRank.of_product(left, right, made.alpha, made.factors)


def assert_same(first: object, second: object) -> None:
    """Equal in every bit and every property, part by part."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(*(each.float() if each.dtype.itemsize == 1 else each for each in (first, second)))
    elif isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif is_dataclass(first):
        assert type(first) is type(second)
        for field in fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


@dataclass(frozen=True)
class Source:
    """A checkpoint folder of one file, as the writer wants it."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def tiny_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Source:
    """A random Llama of two blocks with a tokenizer, a chat template and a licence."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "tokenizer.py").write_text("raise SystemExit")
    return Source(folder, config.to_dict(), load_file(folder / "model.safetensors"))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the blocks by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def write_quantized(
    source: Source,
    folder: Path,
    export_format: ExportFormat,
    made: Sequence[Made | Scheme],
    shard_bytes: int = 1 << 30,
    formats: Collection[ExportFormat] = (),
) -> nn.Module:
    """Write the source with random results, made in turn; the original model with the weights that they stand for.

    formats   all of the job's; with `peft` among them the written checkpoint holds the base alone
    """
    writer = open_writer(folder, export_format, source, formats, shard_bytes=shard_bytes)
    return write_with(writer, source, made, export_format)


def write_with(
    writer: Writer, source: Source, made: Sequence[Made | Scheme], rounds_as: ExportFormat = ExportFormat.NATIVE
) -> nn.Module:
    """`write_quantized` with a writer of one's own; the model has the numbers that the format `rounds_as` stores."""
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    for index, (name, linear) in enumerate(linears(model)):
        shape = (linear.out_features, linear.in_features)
        result = random_result(shape, made[index % len(made)], linear.weight.dtype, seed=index)
        result = StoredScales().of(rounds_as, name, result)
        writer.add_linear(name, result)
        if isinstance(result.weight, AffineWeight):
            result = replace(result, weight=held(rounds_as, name, result.weight))
        linear.weight.data = result.dequantize()
    writer.finish()
    writer.describe(REPORT)
    assert isinstance(model, nn.Module)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found = model(TOKENS).logits
    assert isinstance(found, Tensor)
    return found
