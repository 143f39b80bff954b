"""Packed formats against the bytes and decoders of other tools, and against their tables decoded by hand in fp64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.methods import Form, Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from tests.formats.examples import Made, codebook_made, random_result, scheme
from workers.formats import awq, gptq, gptq_v2
from workers.formats.bitsandbytes import checkpoint as bitsandbytes
from workers.formats.mlx import checkpoint as mlx
from workers.formats.packed import gptq_words, load_packed
from workers.formats.registry import format_of
from workers.formats.stored_linear import StoredAbsmax, StoredLinear
from workers.numerics.normal_float import DoubleQuantization
from workers.numerics.quantized import AffineWeight, CodebookWeight, LinearResult, QuantizedAbsmax

GOLDEN = Path(__file__).parents[1] / "golden"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
"""QLoRA, appendix E."""


def golden(name: str, file: str = "packed_formats") -> dict[str, Tensor]:
    """The tensors of one example as those of the linear `x`, and what its own tool decodes of them."""
    stored = load_file(GOLDEN / f"{file}.safetensors")
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    return {key if key == "dequantized" else f"x.{key}": tensor for key, tensor in own.items()}


def described(of: Scheme, dtype: torch.dtype, form: Form = Form.AFFINE, **more: object) -> StoredLinear:
    return StoredLinear.model_validate(
        {"form": form, **of.model_dump(exclude_none=True), "dtype": str(dtype).removeprefix("torch."), **more}
    )


def fields(words: Tensor, bits: int, count: int) -> list[list[int]]:
    """Codes of each row of a dense little-endian stream, by Python's own whole numbers."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([(stream >> (bits * place)) & (2**bits - 1) for place in range(count)])
    return rows


# GPTQ


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_gptqmodel_come_back_as_they_are(bits: int, form: str) -> None:
    """Zero points of at least 1, in both forms; the golden inputs are in another order, which words do not know."""
    stored, less = golden(f"bits{bits}_{form}", "gptqmodel_weights"), int(form == "v1")
    about = described(scheme(bits, 32, False), F16)
    found = gptq_words.decompress("x", stored, about, less)
    again = gptq_words.compress("x", found, ExportFormat.GPTQ_V2, less)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(again[f"x.{part}"], stored[f"x.{part}"]), part
    weight, order = found.affine, stored["x.g_idx"].long()
    assert weight.zero_point is not None
    by_hand = (weight.codes.double() - weight.zero_point.double()[:, order]) * weight.scale.double()[:, order]
    assert torch.equal(by_hand.to(F16).float(), stored["dequantized"].to(F16).float())


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, True), (8, True), (3, False), (4, False)])
@pytest.mark.parametrize("form", [gptq, gptq_v2])
def test_gptq_by_its_table(form: object, bits: int, symmetric: bool) -> None:
    if form is gptq and not symmetric:
        return
    result = random_result((32, 96), scheme(bits, 32, symmetric), F16)
    tensors = (gptq if form is gptq else gptq_v2).compress("x", result)
    codes = torch.tensor(fields(tensors["x.qweight"].T, bits, 96), dtype=torch.float64)
    zeros = torch.tensor(fields(tensors["x.qzeros"], bits, 32), dtype=torch.float64).T + (form is gptq)
    columns = tensors["x.g_idx"].long()
    by_hand = (codes - zeros[:, columns]) * tensors["x.scales"].T.double()[:, columns]
    assert tensors["x.qweight"].shape == (96 * bits // 32, 32)
    assert torch.equal(by_hand.to(F16), result.dequantize())


def test_symmetric_zero_points_of_the_first_form_are_sevens() -> None:
    tensors = gptq.compress("x", random_result((32, 32), scheme(4, 32, True), F16))
    assert tensors["x.qzeros"].unique().tolist() == [0x77777777]
    assert gptq_v2.compress("x", random_result((32, 32), scheme(8, 32, True), F16))["x.qzeros"].unique().tolist() == [
        0x80808080 - (1 << 32)
    ]


def test_gptq_names_what_differs_and_what_stays() -> None:
    attention = {f"model.layers.0.self_attn.{part}_proj": scheme(8, 32, True) for part in "qkv"}
    others = {f"model.layers.{n}.mlp.down_proj": scheme(4, 64, True) for n in range(4)}
    found = gptq_words.config(attention | others, ["lm_head", "model.layers.0.mlp.up_proj"], "gptq")
    assert (found["bits"], found["group_size"], found["sym"], found["lm_head"]) == (4, 64, True, False)
    (differs, stays) = json.loads(json.dumps(found["dynamic"])).items()
    assert differs[0].startswith("+:^(?:")
    assert differs[1] == {"bits": 8, "group_size": 32, "sym": True}
    assert r"model\.layers\.0\.self_attn\.qkv_proj" in differs[0]  # the name that vLLM asks for
    assert stays == (r"-:^(?:lm_head|model\.layers\.0\.mlp\.up_proj)$", {})


# AWQ


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_autoawq_come_back_as_they_are(symmetric: bool) -> None:
    stored = golden("awq_symmetric" if symmetric else "awq")
    found = awq.decompress("x", stored, described(scheme(4, 32, symmetric), F16))
    again = awq.compress("x", found)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(again[f"x.{part}"], stored[f"x.{part}"]), part
    assert torch.equal(found.dequantize(), stored["dequantized"])


def test_awq_by_its_table() -> None:
    result = random_result((32, 64), scheme(4, 32, False), F16)
    tensors = awq.compress("x", result)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, zeros = (torch.zeros(rows, 32, dtype=torch.float64) for rows in (64, 2))
    for target, words in ((codes, "qweight"), (zeros, "qzeros")):
        for row, packed in enumerate(fields(tensors[f"x.{words}"], 4, 32)):
            for place, code in enumerate(packed):
                target[row, place // 8 * 8 + order[place % 8]] = code
    groups = torch.arange(64) // 32
    by_hand = (codes - zeros[groups]) * tensors["x.scales"].double()[groups]
    assert torch.equal(by_hand.T.to(F16), result.dequantize())


# MLX


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_of_mlx_come_back_as_they_are(bits: int) -> None:
    """Its own biases are fractional offsets; what it decodes in fp32 is ours up to the order of its arithmetic."""
    stored = golden(f"mlx{bits}")
    found = mlx.decompress("x", stored, described(scheme(bits, 32, False), F32, offset=True))
    again = mlx.compress("x", found) if bits < 8 else {}
    for name, tensor in again.items():
        assert torch.equal(tensor, stored[name]), name
    # One rounding of the product more than ours: at most half an ulp of it, and half an ulp of the sum.
    assert (found.dequantize() - stored["dequantized"]).abs().max() <= 2**-23 * 0.3


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_symmetric_weights_in_mlx_are_exact(bits: int, dtype: torch.dtype) -> None:
    result = random_result((8, 96), scheme(bits, 32, True), dtype)
    tensors = mlx.compress("x", result)
    codes = torch.tensor(fields(tensors["x.weight"].view(torch.int32), bits, 96), dtype=torch.float64).view(8, 3, 32)
    scales, biases = (tensors[f"x.{part}"].double().unsqueeze(-1) for part in ("scales", "biases"))
    assert torch.equal((codes * scales + biases).view(8, 96).to(dtype), result.dequantize())
    assert torch.equal(tensors["x.biases"].double(), -(2.0 ** (bits - 1)) * tensors["x.scales"].double())


def test_a_fractional_offset_is_rounded_to_the_models_dtype() -> None:
    result = random_result((8, 64), Made(scheme(4, 32, False), offset=True))
    held = mlx.held("x", result.affine)
    assert held.offset is not None
    assert result.affine.offset is not None
    assert held.offset.dtype is BF16
    assert torch.equal(held.offset, result.affine.offset.to(BF16))
    assert torch.equal(mlx.compress("x", result)["x.biases"], held.offset)


def test_mlx_config_has_the_usual_scheme_and_those_that_differ() -> None:
    found = mlx.config({"a": scheme(4, 64, True), "b": scheme(4, 64, False), "c": scheme(8, 32, True)}, [])
    assert found["group_size"] == 64
    assert found["c"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert "a" not in found


@pytest.mark.parametrize("name", [SchemeName.MXFP4A16, SchemeName.MXFP8A16])
def test_mxs_own_bytes_come_back_as_they_are(name: SchemeName) -> None:
    stored, of = golden(name.removesuffix("a16")), Scheme.named(name)
    about = StoredLinear(form=Form.FLOAT, **of.model_dump(exclude={"name"}), scheme_name=name, dtype="float32")
    found = mlx.decompress("x", stored, about)
    again = mlx.compress("x", found)
    assert again.keys() == stored.keys() - {"dequantized"}
    for key, tensor in again.items():
        assert torch.equal(tensor.view(torch.uint8), stored[key].view(torch.uint8)), key
    assert torch.equal(found.dequantize(), stored["dequantized"])
    assert mlx.config({"x": of}, [])["mode"] == name.removesuffix("a16")
    parts = {key.removeprefix("x"): tensor for key, tensor in stored.items()}
    assert torch.equal(load_packed.mlx("x", parts, mlx.config({"x": of}, [])), stored["dequantized"])


def test_mlx_holds_no_other_float_schemes() -> None:
    with pytest.raises(FormatCannotHold, match="mlx holds no weights of nvfp4a16"):
        mlx.compress("x", random_result((32, 64), Made(Scheme.named(SchemeName.NVFP4A16), Form.FLOAT)))


# bitsandbytes


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_bytes_of_bitsandbytes_come_back_as_they_are(dtype: torch.dtype) -> None:
    stored = golden(f"nf4_plain_{str(dtype).removeprefix('torch.')}")
    found = bitsandbytes.decompress("x", stored, described(scheme(4, 64, True), dtype, Form.CODEBOOK))
    assert torch.equal(found.dequantize(), stored["dequantized"])
    again = bitsandbytes.compress("x", found)
    assert again.keys() == stored.keys() - {"dequantized"}
    for name, tensor in again.items():
        if name.endswith("__nf4"):
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(stored[name].tolist()))
        else:
            assert torch.equal(tensor, stored[name]), name


def test_a_second_level_of_ours_is_what_bitsandbytes_reads() -> None:
    """The library multiplies in another order than `QuantizedAbsmax`: the last bits of fp32 may differ."""
    stored = golden("nf4_even")
    about = described(scheme(4, 32, True), F32, Form.CODEBOOK, absmax=StoredAbsmax(bits=8, superblock=256))
    found = bitsandbytes.decompress("x", stored, about)
    again = bitsandbytes.compress("x", found)
    assert torch.equal(again["x.weight.nested_quant_map"], stored["x.weight.nested_quant_map"])
    assert json.loads(bytes(again[f"x.{STATE}"].tolist())) == json.loads(bytes(stored[f"x.{STATE}"].tolist()))
    theirs, ours = stored["dequantized"], found.dequantize()
    assert ((theirs - ours).abs() <= 2**-22 * theirs.abs()).all()
    assert (theirs.to(BF16) != ours.to(BF16)).float().mean() < 1e-3


@pytest.mark.parametrize("kind", ["plain", "nested"])
def test_the_loader_reads_the_librarys_own_bytes(kind: str) -> None:
    stored = golden(f"nf4_{kind}_float32")
    parts = {key.removeprefix("x"): tensor for key, tensor in stored.items()}
    assert torch.equal(load_packed.nf4("x", parts, {}), stored["dequantized"])


def test_nf4_by_its_table() -> None:
    result = random_result((4, 64), codebook_made(4, 32))
    tensors = bitsandbytes.compress("x", result)
    octets = tensors["x.weight"].flatten().tolist()
    codes = [code for octet in octets for code in (octet >> 4, octet & 15)]
    levels = torch.tensor(NF4, dtype=torch.float64)[codes].view(4, 2, 32)
    by_hand = (levels * tensors["x.weight.absmax"].double().view(4, 2, 1)).view(4, 64)
    assert (by_hand - result.dequantize().double()).abs().max() <= 2**-8 * by_hand.abs().max()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (codebook_made(3, 32), "does not hold"),
        (codebook_made(4, 16), "does not hold"),
        (codebook_made(4, -1), "does not hold"),
        (codebook_made(4, 32, DoubleQuantization(8, F32, 16)), "shares a scale among"),
        (codebook_made(4, 32, rank=2), "without low-rank factors"),
        (scheme(4, 32, True), "holds NF4 weights"),
    ],
    ids=str,
)
def test_bitsandbytes_refuses_what_it_cannot_hold_with_a_way_out(made: Made | Scheme, words: str) -> None:
    with pytest.raises(FormatCannotHold, match=words) as caught:
        bitsandbytes.compress("x", random_result((32, 64), made))
    assert "ask for formats" in str(caught.value.hint)


def test_another_codebook_is_refused() -> None:
    result = random_result((32, 64), codebook_made(4, 32))
    assert isinstance(result.weight, CodebookWeight)
    other = CodebookWeight(result.weight.codes, torch.linspace(-1, 1, 16), torch.ones(32, 2), scheme(4, 32, True), BF16)
    with pytest.raises(FormatCannotHold, match="its own NF4 codebook"):
        bitsandbytes.compress("x", LinearResult(other))


# All


PACKED = [ExportFormat(name) for name in ("gptq", "gptq-v2", "awq", "mlx")]


@pytest.mark.parametrize("name", PACKED)
def test_a_scale_of_another_dtype_is_refused_and_never_rounded(name: ExportFormat) -> None:
    compress = format_of(name).compress
    assert compress is not None
    weight = random_result((32, 64), scheme(4, 32, True), BF16).affine
    other = AffineWeight(weight.codes, weight.scale.float(), None, weight.scheme, BF16)
    with pytest.raises(FormatCannotHold, match="rounding them would change the weights"):
        compress("x", LinearResult(other))


@pytest.mark.parametrize("name", [ExportFormat.GPTQ, ExportFormat.AWQ])
@pytest.mark.parametrize("shape", [(24, 64), (64, 48)])
def test_words_that_are_not_filled_are_refused(name: ExportFormat, shape: tuple[int, int]) -> None:
    compress = format_of(name).compress
    assert compress is not None
    with pytest.raises(FormatCannotHold, match=r"does not fill|does not hold"):
        compress("x", random_result(shape, scheme(4, -1, True), F16))


def test_offsets_have_no_place_in_words() -> None:
    with pytest.raises(FormatCannotHold, match="whole zero points"):
        awq.compress("x", random_result((32, 64), Made(scheme(4, 32, False), offset=True), F16))


@pytest.mark.parametrize("name", [*PACKED, ExportFormat.BITSANDBYTES])
def test_a_missing_tensor_is_named(name: ExportFormat) -> None:
    made = codebook_made(4, 32) if name is ExportFormat.BITSANDBYTES else Made(scheme(4, 32, True))
    result = random_result((32, 64), made, F16)
    compress, decompress = format_of(name).compress, format_of(name).decompress
    assert compress is not None
    assert decompress is not None
    for key in (stored := compress("x", result)):
        if key.endswith("g_idx"):
            continue
        with pytest.raises(CorruptCheckpoint, match="is missing"):
            decompress("x", {k: t for k, t in stored.items() if k != key}, StoredLinear.of(result))


def test_a_second_level_comes_back() -> None:
    result = random_result((32, 64), codebook_made(4, 32, DoubleQuantization(8, F32, 64)))
    back = bitsandbytes.decompress("x", bitsandbytes.compress("x", result), StoredLinear.of(result)).weight
    assert isinstance(back, CodebookWeight)
    assert isinstance(back.absmax, QuantizedAbsmax)
    assert torch.equal(back.dequantize(), result.dequantize())
