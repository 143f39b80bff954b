"""Ways to load a job's checkpoints, and the report where they differ."""

from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from app.domain.formats import ExportFormat
from app.domain.request.job_request import Requirements
from bitwright.report import AdapterReport, Figures, MergeReport, Quality, Report, ShippedFigures
from tests.formats.examples import random_result, scheme
from tests.reports import QUALITY, report
from workers.engine.shipped import Factors, shipments
from workers.engine.shipped_quality import Evaluated, differences
from workers.formats.gguf.blocks import held, pack, unpack
from workers.numerics.quantized import LowRank
from workers.supervise.attempt.requirements import missed_requirement

CT, GGUF, MERGED, NATIVE, PEFT = (
    ExportFormat.COMPRESSED_TENSORS,
    ExportFormat.GGUF,
    ExportFormat.MERGED,
    ExportFormat.NATIVE,
    ExportFormat.PEFT,
)


def told(formats: Sequence[ExportFormat], **given: object) -> list[str]:
    arguments = {"factors": False, "trained": True, "merge": None, "rounding": (), **given}
    return [
        "+".join(way.checkpoints) + (f" with {way.adapter}" if way.adapter else "") + ("" if way.is_whole else " alone")
        for way in shipments(formats, **arguments)  # type: ignore[arg-type]
    ]


def test_ways_of_every_kind_of_job() -> None:
    """Requested formats are first, and those that are only a part last."""
    assert told([CT], trained=False) == ["compressed-tensors+native"]
    assert told([GGUF, MERGED], trained=False, rounding=(GGUF,)) == ["gguf", "merged+native"]
    assert told([MERGED, PEFT], factors=True) == ["merged with peft", "native", "merged alone"]
    assert told([PEFT], factors=True, trained=False) == ["native with peft", "native"]
    assert told([MERGED], factors=True) == ["merged+native", "native with adapter"]
    assert told([NATIVE], factors=True, merge="16bit") == ["native", "native with adapter"]
    assert told([CT, MERGED]) == [
        "compressed-tensors+merged+native with adapter",
        "compressed-tensors+merged+native alone",
    ]
    assert told([CT], merge="quantized") == ["compressed-tensors+native"]
    assert told([GGUF, PEFT], factors=True, rounding=(GGUF,)) == ["gguf with peft", "native", "gguf alone"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_applied_as_stock_peft_applies_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24, bias=False, dtype=dtype))
    a, b = torch.randn(3, 16, generator=generator), torch.randn(24, 3, generator=generator)
    x = torch.randn(5, 16, generator=generator).to(dtype)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.clone(), b.clone()
    update = Factors(LowRank(a, b, 8.0))
    with torch.no_grad():
        expected, plain = model(x), layer.base_layer(x)
        assert torch.equal((plain + update(x)).to(dtype), expected)


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_what_gguf_holds_is_what_its_bytes_say(bits: int) -> None:
    weight = random_result((8, 64), scheme(bits, 32, False), torch.float16).affine
    kept, packed = held("x", weight), pack("x", weight)
    blocks = packed.data.view(8, 2, -1)
    assert kept.offset is not None
    assert torch.equal(kept.offset, blocks[..., 2:4].contiguous().view(torch.float16)[..., 0])
    assert torch.equal(kept.codes, unpack(packed.data, packed.kind, weight.scheme, weight.dtype).codes)
    symmetric = random_result((8, 64), scheme(bits, 32, True), torch.float16).affine
    assert held("x", symmetric) is symmetric


def figures(perplexity: float) -> Figures:
    return Figures(perplexity=perplexity, kl_divergence=0.1, top1_agreement=0.9)


def way(checkpoint: str, perplexity: float, adapter: str | None = None, *, whole: bool = True) -> ShippedFigures:
    return ShippedFigures(checkpoints=(checkpoint,), adapter=adapter, whole=whole, figures=figures(perplexity))


WAYS = (way("merged", 12.0, "peft"), way("native", 13.0), way("merged", 99.0, whole=False))


def test_a_checkpoint_s_quality_is_that_of_the_whole_result() -> None:
    found = report(quality=QUALITY, shipped=WAYS)

    def of(checkpoint: str) -> float:
        quality = found.quality_of(checkpoint)
        assert quality is not None
        assert (quality.text, quality.perplexity_original) == (QUALITY.text, QUALITY.perplexity_original)
        return quality.perplexity

    assert [of(name) for name in ("merged", "peft", "native", "adapter")] == [12.0, 12.0, 13.0, 12.0]
    assert report(shipped=WAYS).quality_of("merged") is None
    assert report(quality=QUALITY).quality_of("merged") == QUALITY


def test_requirements_are_held_against_every_checkpoint_that_was_asked_for() -> None:
    limit, found = Requirements(max_perplexity_ratio=1.25), report(quality=QUALITY, shipped=WAYS)
    assert missed_requirement(limit, found, ["merged", "peft"]) is None
    missed = missed_requirement(limit, found, ["merged", "peft", "native"])
    assert missed is not None
    assert missed.detail == "max_perplexity_ratio is 1.25, the result has 1.3 as native"


@pytest.mark.parametrize(
    ("before", "rounded", "words"),
    [(11.0, True, "leave round_offset out"), (11.0, False, "leave merge out"), (99.0, True, "use more bits")],
)
def test_a_missed_requirement_names_the_merge_that_cost_it(before: float, rounded: bool, words: str) -> None:
    merge = MergeReport(
        codes_and_scales_kept=True, linears=1, rounded=rounded, error_exact=0.0, error_stored=0.0, error_shipped=0.0
    )
    adapter = AdapterReport(
        kind="qa-hira",
        rank=1,
        inner_ranks=(1, 1),
        parameters=1,
        flops_per_token=1,
        bits_per_weight=1.0,
        merge=merge,
        before_merge=figures(before),
    )
    found: Report = report(quality=QUALITY, adapter=adapter)
    missed = missed_requirement(Requirements(max_perplexity_ratio=1.15), found)
    assert missed is not None
    assert missed.hint is not None
    assert words in missed.hint


def test_only_notable_differences_are_told() -> None:
    quality: Quality = QUALITY
    alike = Evaluated(quality, (way("merged", 12.0), way("native", 12.05)), figures(11.95))
    assert list(differences(alike, None, "rounding")) == []
    apart = Evaluated(quality, (way("merged", 12.0, "peft"), way("native", 13.0), WAYS[2]), figures(2.25))
    found = dict(differences(apart, None, "rounding offsets"))
    assert found.keys() == {"merge_changed_the_result", "formats_differ"}
    assert (
        "rounding offsets changes the result: perplexity 12 as it ships, 2.25 with" in found["merge_changed_the_result"]
    )
    assert "native gives perplexity 13, merged with peft 12" in found["formats_differ"]
