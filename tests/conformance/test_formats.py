"""Conformance of formats: a weight goes in and comes out bit for bit, and every runtime sees the same numbers."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from app.domain.formats import FORMATS, ExportFormat, FormatInfo, LowRankRule, Offsets, ScaleDtype
from app.domain.methods import Form, Scheme, SchemeName
from bitwright.errors import FormatCannotHold
from tests.engine.model.loading import loader
from tests.formats.examples import (
    TOKENS,
    Made,
    Source,
    assert_same,
    codebook_made,
    linears,
    logits,
    random_result,
    scheme,
    tiny_llama,
    write_quantized,
)
from workers.formats import compressed_tensors, merged, peft
from workers.formats.registry import format_of
from workers.formats.stored_linear import StoredLinear, StoredLowRank
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import (
    AffineWeight,
    BlockWeight,
    CodebookWeight,
    FloatWeight,
    LinearResult,
    QuantizedAbsmax,
    QuantizedWeight,
)

CT, NATIVE, MERGED = ExportFormat.COMPRESSED_TENSORS, ExportFormat.NATIVE, ExportFormat.MERGED
PEFT = ExportFormat.PEFT
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
UNIFORM = [scheme(bits, group, symmetric) for bits in range(2, 9) for group in (32, -1) for symmetric in (True, False)]
MIXED_SYMMETRIC = [scheme(4, 32, True), scheme(8, -1, True), scheme(3, 16, True), scheme(2, 32, True)]
MIXED = [scheme(4, 32, True), scheme(8, -1, False), scheme(3, 16, False), scheme(2, 32, True)]
"""The last row of each kind: one scheme after the other, linear by linear."""
NAMED = [Scheme.named(name) for name in sorted(FORMATS[CT].schemes)]
ROUNDING = [s for s in NAMED if s.row is not None and s.row.activations is not None and s.name != SchemeName.FP8_BLOCK]
"""Inputs are rounded when transformers loads them packed."""
WEIGHTS_ALONE = [s for s in NAMED if s not in ROUNDING]
MIXED_NAMED = [scheme(4, 32, True), Scheme.named(SchemeName.FP8), Scheme.named(SchemeName.NVFP4A16)]
EVERY_SCHEME = [*NAMED, scheme(4, 32, True), scheme(3, 16, False)]


EVERY_FORM = [
    Made(scheme(3, 16, False), rank=3),
    codebook_made(4, 32),
    codebook_made(2, 16, DoubleQuantization(3, F16, 5), rank=2),
    Made(scheme(5, -1, True), rank=4, alpha=1.0, factors=F32),
    Made(scheme(4, 32, False), offset=True),
    codebook_made(3, -1, F32),
]
NOT_FOR_COMPRESSED_TENSORS = [
    codebook_made(4, 32),
    Made(scheme(4, 32, True), rank=2),
    Made(scheme(4, 32, False), offset=True),
]

peft_meets_transformers = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""peft 0.21 still asks models by the name that transformers 5.23 deprecates."""


def label(value: object) -> str:
    """A readable test id of a list of schemes: w4g32 is symmetric, w4g32z has zero points."""
    if value is EVERY_FORM or not isinstance(value, Sequence):
        return "every-form" if value is EVERY_FORM else str(value)
    return "+".join(s.name or f"w{s.bits}g{s.group_size}{'' if s.symmetric else 'z'}" for s in value)


NAME = "model.layers.0.mlp.up_proj"


def through_peft(result: LinearResult) -> LinearResult:
    low_rank = result.low_rank
    assert low_rank is not None
    stored = StoredLowRank(rank=low_rank.rank, alpha=low_rank.alpha)
    config = json.loads(json.dumps(peft.config({NAME: stored}, [])))
    return replace(result, low_rank=peft.decompress(NAME, peft.compress(NAME, low_rank), config))


def through(export_format: ExportFormat, result: LinearResult) -> LinearResult:
    """The result after `compress` and `decompress` of the format."""
    if export_format is PEFT:
        return through_peft(result)
    decompress = format_of(export_format).decompress
    assert decompress is not None
    found = decompress(NAME, compress(export_format, NAME, result), StoredLinear.of(result))
    return found if export_format.info.always_kept else replace(found, weight=in_the_dtypes_of(result, found))


def in_the_dtypes_of(made: LinearResult, found: LinearResult) -> QuantizedWeight:
    """The weight that was found, with what may have come back in a wider dtype in that which was made."""
    weight, own = found.weight, made.weight
    if isinstance(weight, AffineWeight) and isinstance(own, AffineWeight):
        if own.offset is not None and weight.offset is not None:
            # Formats whose offsets are rounded are held to the rounded ones.
            weight = replace(weight, offset=own.offset)
        return replace(weight, scale=narrowed(weight.scale, own.scale))
    if isinstance(weight, FloatWeight | BlockWeight):
        return weight
    assert isinstance(weight, CodebookWeight)
    assert isinstance(own, CodebookWeight)
    if isinstance(weight.absmax, Tensor):
        assert isinstance(own.absmax, Tensor)
        return replace(weight, absmax=narrowed(weight.absmax, own.absmax))
    assert isinstance(own.absmax, QuantizedAbsmax)
    return replace(weight, absmax=replace(weight.absmax, scale=narrowed(weight.absmax.scale, own.absmax.scale)))


def narrowed(found: Tensor, made: Tensor) -> Tensor:
    """The numbers that were made, which are those that were found, bit for bit."""
    assert found.dtype in (made.dtype, F32)
    assert torch.equal(found.double(), made.double())
    return made


def compress(export_format: ExportFormat, name: str, result: LinearResult) -> dict[str, Tensor]:
    compress = format_of(export_format).compress
    assert compress is not None
    return compress(name, result)


MODELS = [name for name in FORMATS if not name.info.is_adapter]
INVERTIBLE = [name for name in FORMATS if not name.info.dense]
"""A dense checkpoint has no codes any more: it is held to its numbers instead."""


@pytest.mark.parametrize("export_format", MODELS)
def test_every_format_offers_what_the_suite_asks_for(export_format: ExportFormat) -> None:
    offered = format_of(export_format)
    assert offered.compress is not None
    assert (offered.decompress is None) == export_format.info.dense


@st.composite
def floats(draw: st.DrawFn, info: FormatInfo) -> LinearResult:
    """Of the schemes by name of a floating-point element that the table allows the format."""
    names = [name for name in sorted(info.schemes) if Scheme.named(name).form is Form.FLOAT]
    chosen = Scheme.named(draw(st.sampled_from(names)))
    columns = draw(st.integers(1, 5)) * 32 if chosen.group_size != 128 else draw(st.integers(1, 300))
    lowest = {LowRankRule.BESIDE: 0, LowRankRule.IS: 1}.get(info.low_rank)
    rank = 0 if lowest == 0 else draw(st.integers(lowest or 0, 5))
    dtype = draw(st.sampled_from([BF16, F16, F32]))
    made = Made(chosen, Form.FLOAT, rank=rank)
    return random_result((draw(st.integers(1, 200)), columns), made, dtype, draw(st.integers(0, 2**31)))


@st.composite
def blocks(draw: st.DrawFn, info: FormatInfo) -> LinearResult:
    """Of llama.cpp's types that the table allows the format, in rows of one super-block or several."""
    names = [name for name in sorted(info.schemes) if Scheme.named(name).form is Form.BLOCKS]
    columns = draw(st.sampled_from([32, 64, 96, 256, 512]))
    lowest = {LowRankRule.BESIDE: 0, LowRankRule.IS: 1}.get(info.low_rank)
    rank = 0 if lowest == 0 else draw(st.integers(lowest or 0, 5))
    made = Made(Scheme.named(draw(st.sampled_from(names))), Form.BLOCKS, rank=rank)
    dtype = draw(st.sampled_from([BF16, F16, F32]))
    return random_result((draw(st.integers(1, 40)), columns), made, dtype, draw(st.integers(0, 2**31)))


@st.composite
def results(draw: st.DrawFn, export_format: ExportFormat) -> LinearResult:
    """Of every form and scheme that the table allows the format."""
    info = FORMATS[export_format]
    # A table's row may hold all forms, and no scheme by name.
    by_name = {Scheme.named(name).form for name in info.schemes}
    form = draw(st.sampled_from(sorted(info.kinds - ({Form.FLOAT, Form.BLOCKS} - by_name))))
    if form is Form.FLOAT:
        return draw(floats(info))
    if form is Form.BLOCKS:
        return draw(blocks(info))
    multiple = info.group_multiple
    sizes = [-1, *(size for size in (1, 3, 8, 32, 64, 96) if size % multiple == 0)]
    group = draw(st.sampled_from([size for size in sizes if info.group_sizes is None or size in info.group_sizes]))
    columns = (
        multiple * draw(st.integers(1, max(3, 70 // multiple))) if group == -1 else group * draw(st.integers(1, 5))
    )
    symmetric = form is Form.CODEBOOK or draw(st.sampled_from(sorted(info.symmetries)))
    bits = info.bits if symmetric or info.asymmetric_bits is None else info.asymmetric_bits
    second = st.builds(
        DoubleQuantization,
        st.sampled_from([2, 3, 4, 8]),
        st.sampled_from([BF16, F16, F32]),
        st.sampled_from([64, 256] if export_format is ExportFormat.BITSANDBYTES else [4, 16]),
    )
    lowest = {LowRankRule.BESIDE: 0, LowRankRule.IS: 1}.get(info.low_rank)
    made = Made(
        scheme=scheme(draw(st.sampled_from(sorted(bits))), group, symmetric),
        form=form,
        absmax=draw(st.one_of(st.sampled_from([BF16, F16, F32]), second)),
        offset=form is Form.AFFINE
        and not symmetric
        and info.offsets in (Offsets.EXACT, Offsets.MODEL)
        and draw(st.booleans()),
        rank=0 if lowest == 0 else draw(st.integers(lowest or 0, 5)),
        alpha=draw(st.sampled_from([1.0, 16.0, 0.5])),
        factors=draw(st.sampled_from([BF16, F32])),
    )
    dtype = F16 if info.scales in (ScaleDtype.FLOAT16, ScaleDtype.COMMON) else draw(st.sampled_from([BF16, F16, F32]))
    most = max(1, 40 // info.output_multiple)
    rows = info.output_multiple * draw(st.integers(1, most))
    return random_result((rows, columns), made, dtype, draw(st.integers(0, 2**31)))


@pytest.mark.parametrize("export_format", INVERTIBLE)
@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_decompress_inverts_compress(export_format: ExportFormat, data: st.DataObject) -> None:
    result = data.draw(results(export_format))
    assert_same(through(export_format, result), result)


@pytest.mark.parametrize("export_format", MODELS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_tensors_are_named_after_their_linear_and_share_no_memory(
    export_format: ExportFormat, data: st.DataObject
) -> None:
    result = data.draw(results(export_format))
    tensors = compress(export_format, NAME, result)
    assert all(name.startswith(NAME + ".") for name in tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    other = compress(export_format, "other", data.draw(results(export_format)))
    assert save({**tensors, **other})  # safetensors refuses tensors that share memory, such as a codebook


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_merged_is_the_weight_that_the_result_stands_for(data: st.DataObject) -> None:
    result = data.draw(results(MERGED))
    assert_same(merged.compress(NAME, result), {f"{NAME}.weight": result.dequantize()})


@pytest.mark.parametrize("made", NOT_FOR_COMPRESSED_TENSORS, ids=str)
def test_compressed_tensors_refuses_what_it_would_have_to_change(made: Made) -> None:
    with pytest.raises(FormatCannotHold, match="whole zero points, without low-rank factors"):
        compressed_tensors.compress(NAME, random_result((32, 64), made))


def decompressed(tensors: Mapping[str, Tensor], group: Any) -> Tensor:
    """compressed-tensors' own weight of one linear's tensors, by the format of its group."""
    found = BaseCompressor.get_value_from_registry(group.format).decompress(dict(tensors), group)["weight"]
    assert isinstance(found, Tensor)
    return found


def decodes_to_bf16(scheme: Scheme) -> bool:
    """compressed-tensors' decoders of NVFP4 and MX give bf16, whatever dtype the model has."""
    return scheme.name is not None and scheme.name.startswith(("nv", "mx"))


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_compressed_tensors_dequantizes_the_same_bits(data: st.DataObject) -> None:
    _same_bits_in_compressed_tensors(data.draw(results(CT)).weight)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("name", sorted(FORMATS[CT].schemes))
def test_compressed_tensors_dequantizes_every_scheme_to_the_same_bits(name: SchemeName, dtype: torch.dtype) -> None:
    made = Made(Scheme.named(name), Scheme.named(name).form)
    _same_bits_in_compressed_tensors(random_result((200, 320), made, dtype).weight)


def _same_bits_in_compressed_tensors(weight: QuantizedWeight) -> None:
    tensors = compressed_tensors.compress("x", LinearResult(weight))
    stored = {name.removeprefix("x."): t for name, t in tensors.items()}
    config = QuantizationConfig.model_validate(compressed_tensors.config({"x": weight.scheme}, []))
    theirs = decompressed(stored, config.config_groups["group_0"])
    narrow = decodes_to_bf16(weight.scheme)
    assert theirs.dtype == (BF16 if narrow else weight.dtype)
    ours = replace(weight, dtype=BF16) if narrow else weight
    assert torch.equal(theirs, ours.dequantize())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return tiny_llama(tmp_path_factory.mktemp("source"))


def load_unpacked(folder: Path) -> Any:
    """As the model card says for training."""
    with warnings.catch_warnings():
        # transformers tells that it takes the rest of the configuration from the checkpoint, which is what we want.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        options = CompressedTensorsConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)


def assert_logits_agree(model: Any, expected: Any) -> None:
    """Within 2 bf16 ulp at the largest logit."""
    ours, theirs = logits(expected), logits(model)
    largest = ours.abs().max()
    ulp = torch.finfo(torch.bfloat16).eps * 2.0 ** torch.floor(torch.log2(largest.float()))
    assert (ours.float() - theirs.float()).abs().max() <= 2 * ulp


def assert_weights_equal(model: nn.Module, expected: nn.Module) -> None:
    found = dict(linears(model))
    for name, linear in linears(expected):
        assert torch.equal(found[name].weight, linear.weight), name


@pytest.mark.parametrize(
    "schemes", [*([s] for s in UNIFORM), MIXED_SYMMETRIC, *([s] for s in WEIGHTS_ALONE)], ids=label
)
def test_transformers_loads_what_was_written(tmp_path: Path, source: Source, schemes: Sequence[Scheme]) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert_logits_agree(model, expected)  # the first call unpacks what was loaded packed
    assert_weights_equal(model, expected)


@pytest.mark.parametrize("schemes", [*([s] for s in ROUNDING), MIXED_NAMED], ids=label)
def test_transformers_rounds_inputs_and_has_our_weights(
    tmp_path: Path, source: Source, schemes: Sequence[Scheme]
) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rounded = logits(model)
    assert_weights_equal(model, expected)
    assert not torch.equal(rounded, logits(expected))
    for module in model.modules():
        module.quantization_enabled = False
    assert_logits_agree(model, expected)


@pytest.mark.parametrize("schemes", [[s] for s in NAMED], ids=label)
def test_transformers_unpacks_every_scheme_while_loading(
    tmp_path: Path, source: Source, schemes: Sequence[Scheme]
) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    model = load_unpacked(tmp_path / "out")
    assert_weights_equal(model, expected)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("schemes", [[s] for s in WEIGHTS_ALONE], ids=label)
def test_weights_alone_load_in_a_model_of_fp32(tmp_path: Path, schemes: Sequence[Scheme]) -> None:
    """Decoders of NVFP4 round to bf16 there; the scales of the rest are powers of two, or of the model's dtype."""
    expected = write_quantized(tiny_llama(tmp_path / "source", F32), tmp_path / "out", CT, schemes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == F32
    if schemes[0].name == SchemeName.NVFP4A16:
        for _, linear in linears(expected):
            linear.weight.data = linear.weight.bfloat16().float()
    assert (logits(model) - logits(expected)).abs().max() < 1e-5
    assert_weights_equal(model, expected)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_the_loader_reads_every_scheme_of_compressed_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = write_quantized(tiny_llama(tmp_path / "source", dtype), tmp_path / "out", CT, EVERY_SCHEME)
    model = loader(tmp_path / "out").load(tmp_path / "out")
    assert model.dtype == dtype
    assert_weights_equal(model, expected)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    "schemes",
    [*([s] for s in UNIFORM), MIXED_SYMMETRIC, MIXED, *([s] for s in NAMED), MIXED_NAMED, EVERY_SCHEME],
    ids=label,
)
def test_every_stored_linear_decompresses_to_our_weight(
    tmp_path: Path, source: Source, schemes: Sequence[Scheme]
) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = QuantizationConfig.model_validate(_config(tmp_path / "out")["quantization_config"])
    for name, linear in linears(expected):
        groups = [g for g in config.config_groups.values() if set(g.targets) & {name, "Linear"}]
        stored = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        assert len(groups) == 1
        assert torch.equal(decompressed(stored, groups[0]), linear.weight)


@peft_meets_transformers
@pytest.mark.parametrize(
    "schemes",
    [[UNIFORM[0]], [scheme(4, 32, True)], [scheme(4, 32, False)], [UNIFORM[-1]], *([s] for s in NAMED)],
    ids=label,
)
def test_a_lora_attaches_and_learns(tmp_path: Path, source: Source, schemes: Sequence[Scheme]) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    model = load_unpacked(tmp_path / "out")
    assert_weights_equal(model, expected)
    _train_lora(model)


@peft_meets_transformers
@pytest.mark.parametrize("schemes", [MIXED_SYMMETRIC, MIXED_NAMED], ids=label)
def test_a_lora_attaches_to_mixed_schemes(tmp_path: Path, source: Source, schemes: Sequence[Scheme]) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, schemes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        module.quantization_enabled = False
    assert_weights_equal(model, expected)
    _train_lora(model)


@peft_meets_transformers
def test_mixed_widths_with_zero_points_come_with_aloader(tmp_path: Path, source: Source) -> None:
    expected = write_quantized(source, tmp_path / "out", CT, MIXED)
    model = loader(tmp_path / "out").load(tmp_path / "out")
    assert_weights_equal(model, expected)
    assert_logits_agree(model, expected)
    _train_lora(model)


@pytest.mark.parametrize(
    "made", [[scheme(5, 16, True)], [scheme(7, -1, False)], [scheme(3, 32, True), *MIXED], EVERY_FORM], ids=label
)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_the_native_loader_gives_identical_weights(
    tmp_path: Path, source: Source, made: Sequence[Made | Scheme], shard_bytes: int
) -> None:
    expected = write_quantized(source, tmp_path / "out", NATIVE, made, shard_bytes)
    model = loader(tmp_path / "out").load(tmp_path / "out")
    assert_weights_equal(model, expected)
    assert torch.equal(logits(model), logits(expected))


def test_the_native_loader_gives_the_base_alone_on_request(tmp_path: Path, source: Source) -> None:
    write_quantized(source, tmp_path / "out", NATIVE, EVERY_FORM)
    bare = [replace(made, rank=0) for made in EVERY_FORM]
    expected = write_quantized(source, tmp_path / "bare", NATIVE, bare)
    shipped = loader(tmp_path / "out")
    assert_weights_equal(shipped.load(tmp_path / "out", merge=False), expected)
    assert not torch.equal(logits(shipped.load(tmp_path / "out")), logits(expected))


@pytest.mark.parametrize("part", ["lora_a", "absmax_codes", "zero_point", "offset", "codebook"])
def test_the_native_loader_refuses_a_checkpoint_that_lacks_a_tensor(tmp_path: Path, source: Source, part: str) -> None:
    write_quantized(source, tmp_path / "out", NATIVE, EVERY_FORM)
    tensors = load_file(tmp_path / "out" / "weights.safetensors")
    lost = next(name for name in tensors if name.endswith(f".{part}"))
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "out" / "weights.safetensors")
    with pytest.raises(ValueError, match=part):
        loader(tmp_path / "out").load_weights(tmp_path / "out")


@pytest.mark.parametrize("made", [[scheme(4, 32, True)], MIXED, EVERY_FORM], ids=label)
def test_a_merged_checkpoint_is_an_ordinary_one(tmp_path: Path, source: Source, made: Sequence[Made | Scheme]) -> None:
    expected = write_quantized(source, tmp_path / "out", MERGED, made, shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert_weights_equal(model, expected)
    assert torch.equal(logits(model), logits(expected))
    config = _config(tmp_path / "out")
    assert config == {**json.loads(json.dumps(source.config)), "dtype": "bfloat16"}


def _config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())
    assert isinstance(found, dict)
    return found


def _train_lora(model: Any) -> None:
    """One step moves the adapter and nothing else."""
    before: dict[str, Tensor] = {name: linear.weight.clone() for name, linear in linears(model)}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    loss = adapted(TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(before)
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values() if gradient is not None)
    for name, module in adapted.base_model.model.named_modules():
        if name in before:
            assert torch.equal(module.base_layer.weight, before[name])
            assert module.base_layer.weight.grad is None
