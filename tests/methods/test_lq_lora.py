"""LQ-LoRA's decomposition against its own statement in fp64, and its configurations against the paper's numbers."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from app.domain.methods import AbsmaxScheme, BitBudget, Candidate, LQLoRASpec, Scheme
from tests.methods.toy_block import toy_task
from workers.contracts.blocks import Fisher, ScoreTask
from workers.methods.lq_lora import SCORED_ROWS, Decomposition, LQLoRA, RankOne, quantize, scored_rows
from workers.methods.lq_lora import decompose as decompose_all
from workers.numerics.low_rank import weighted_factors
from workers.numerics.normal_float import DoubleQuantization, bits_per_weight
from workers.numerics.quantized import CodebookWeight, QuantizedAbsmax

ABSMAX = AbsmaxScheme(bits=8, dtype="float32", superblock=16)
SCHEME = Scheme(bits=2, group_size=16, symmetric=True)


def decompose(
    weight: Tensor, scheme: Scheme, absmax: AbsmaxScheme, weights: RankOne, *, rank: int, iterations: int, seed: int
) -> Decomposition:
    """A batch of one."""
    options = {"rank": rank, "iterations": iterations, "seed": seed}
    (only,) = decompose_all(weight[None], [(scheme, absmax)], [weights], **options)
    return only


def layer(out: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """A weight of decaying spectrum with noise, bf16 values in fp32."""
    generator = torch.Generator().manual_seed(seed)
    a, b, noise = (torch.randn(*s, generator=generator) for s in ((out, 8), (8, width), (out, width)))
    return (0.02 * (a * torch.linspace(2, 0.2, 8)) @ b / 3 + 0.02 * noise).bfloat16().float()


def fisher_of(weight: Tensor) -> tuple[Fisher, Tensor]:
    """Rank-one Fisher information: its sums, and all of it."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = (torch.rand(size, generator=generator) ** 2 + 0.01 for size in weight.shape)
    whole = rows.outer(columns)
    return Fisher(whole.sum(1), whole.sum(0)), whole


def test_bits_of_every_configuration_are_the_paper_s() -> None:
    spec = LQLoRASpec(bits=BitBudget(average=2.75))
    shape = (1024, 4096)
    grid = spec.candidates("model.layers.0.mlp.up_proj", shape[1])
    assert len(grid) == 4 * 4 * 3 * 3 * 3
    found = []
    for choice in grid:
        assert choice.absmax is not None
        c = choice.absmax
        expected = choice.scheme.bits + c.bits / choice.scheme.group_size
        expected += c.dtype_bits / (choice.scheme.group_size * c.superblock)
        stored = DoubleQuantization(c.bits, getattr(torch, c.dtype), c.superblock)
        assert bits_per_weight(choice.scheme.bits, choice.scheme.group_size, stored) == pytest.approx(expected)
        found.append(choice.stored_bits(shape) / (shape[0] * shape[1]))
        assert found[-1] == pytest.approx(expected, abs=1e-12)
    assert min(found) == pytest.approx(2.032227, abs=5e-7)
    assert max(found) == pytest.approx(8.625)
    assert spec.least_bits("x", 4096) == pytest.approx(2.032227, abs=5e-7)
    for bits, expected in ((4, 4.126953), (3, 3.126953)):
        (preset,) = LQLoRASpec(bits=bits).candidates("x", 4096)
        assert preset.stored_bits(shape) / (shape[0] * shape[1]) == pytest.approx(expected, abs=5e-7)


def test_what_a_choice_costs_is_what_its_weight_stores() -> None:
    """Also where the last superblock is not full; beside the codebook and the least maximum, 32 bits."""
    weight = layer(40, 96)
    for bits, group, superblock in ((2, 16, 16), (3, 32, 64), (4, 96, 256)):
        choice = Candidate(Scheme(bits=bits, group_size=group, symmetric=True), AbsmaxScheme(3, "bfloat16", superblock))
        stored = quantize(weight, choice.scheme, choice.absmax).stored_bits()
        assert choice.stored_bits((40, 96)) == stored.codes + stored.scales - 32


def test_group_sizes_that_do_not_divide_are_left_out_and_overrides_win() -> None:
    overrides = {"overrides": {"*.o_proj": {"group_size": 48, "bits": 4}}}
    spec = LQLoRASpec.model_validate({"modules": overrides})
    assert {c.scheme.group_size for c in spec.candidates("model.layers.0.mlp.up_proj", 96)} == {16, 32}
    fixed = spec.candidates("model.layers.0.self_attn.o_proj", 96)
    assert {(c.scheme.bits, c.scheme.group_size) for c in fixed} == {(4, 48)}
    assert len(fixed) == 4 * 3 * 3
    assert spec.candidates("lm_head", 96) == ()


def test_the_unweighted_loop_is_the_iteration_of_loftq_in_another_order() -> None:
    """Exact SVD in fp64 and quantization by turns: the same errors, and the base of the least one is returned."""
    weight = layer()
    found = decompose(
        weight, SCHEME, ABSMAX, RankOne.of(None, weight), rank=40, iterations=20, seed=0
    )  # 40 + 10 columns: the decomposition is exact
    quantized, errors, best = torch.zeros_like(weight).double(), [], None
    for _ in found.errors:
        u, s, v = torch.linalg.svd(weight.double() - quantized, full_matrices=False)
        product = (u[:, :40] * s[:40]) @ v[:40]
        quantized = quantize((weight - product).float(), SCHEME, ABSMAX).dequantize().double()
        errors.append(float((weight - quantized - product).norm()))
        best = quantized if best is None or errors[-1] < min(errors[:-1]) else best
    assert found.errors == pytest.approx(errors, rel=2e-2)
    assert found.errors[0] == pytest.approx(errors[0], rel=1e-4)
    assert best is not None
    left = torch.linalg.svdvals(weight.double() - found.base.dequantize())[40:].norm()
    assert float(torch.linalg.svdvals(weight.double() - best)[40:].norm()) == pytest.approx(float(left), rel=2e-2)
    result = found.base.dequantize() + found.left @ found.right
    assert float((weight - result).norm()) == pytest.approx(float(left), rel=1e-5)
    assert float(left) <= min(found.errors)
    assert all(later < earlier for earlier, later in zip(found.errors[:-2], found.errors[1:-1], strict=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_fall_until_the_last_iteration_and_the_best_is_kept(bits: int, *, weighted: bool) -> None:
    scheme, stopped = SCHEME.model_copy(update={"bits": bits}), 0
    for seed in range(4):
        weight = layer(seed=seed)
        weights = RankOne.of(fisher_of(weight)[0] if weighted else None, weight)
        found = decompose(weight, scheme, ABSMAX, weights, rank=8, iterations=30, seed=seed)
        kept = float(weights.error(weight - found.base.dequantize() - found.left @ found.right))
        assert kept < min(found.errors), "the best factors for its base"
        assert all(later < earlier for earlier, later in itertools.pairwise(found.errors[:-1]))
        stopped += len(found.errors) < 30
        assert len(found.errors) == 30 or found.errors[-1] >= found.errors[-2], "it goes on while it helps"
    assert stopped, "some end because the last was worse, so that the last would not do"


def test_fisher_weighting_lowers_the_error_that_it_weighs() -> None:
    weight = layer()
    fisher, whole = fisher_of(weight)
    errors = []
    for known in (fisher, None):
        found = decompose(weight, SCHEME, ABSMAX, RankOne.of(known, weight), rank=8, iterations=30, seed=0)
        errors.append(float((whole.sqrt() * (weight - found.base.dequantize() - found.left @ found.right)).norm()))
        if known is not None:
            kept = RankOne.of(known, weight).error(weight - found.base.dequantize() - found.left @ found.right)
            assert errors[0] == pytest.approx(float(kept), rel=1e-4), "the sums give back all of a rank-one F"
    assert errors[0] < 0.97 * errors[1]


def test_scores_are_squared_errors_in_the_unit_of_the_information() -> None:
    weight, spec = layer(), LQLoRASpec(rank=8)
    fisher, whole = fisher_of(weight)
    choices = tuple(Candidate(SCHEME.model_copy(update={"bits": bits}), ABSMAX) for bits in (2, 3, 4, 8))
    task = ScoreTask(weight.bfloat16(), choices, fisher, torch.bfloat16, seed=0)
    (scores,) = LQLoRA().candidate_errors([task], spec)
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(scores))
    weights = RankOne.of(fisher, weight)
    left, right = weighted_factors(weight, 8, weights.rows, weights.columns)
    rest = weight - left @ right
    exact = (whole * (rest - quantize(rest, choices[1].scheme, ABSMAX).dequantize()).square()).sum()
    assert scores[1] == pytest.approx(float(exact), rel=1e-4)
    larger = replace(task, fisher=Fisher(4 * fisher.rows, 4 * fisher.columns))
    other = ScoreTask(weight.T.contiguous(), choices[:2], None, torch.bfloat16, seed=0)
    first, between, again = LQLoRA().candidate_errors([larger, other, task], spec)
    assert first == pytest.approx([4 * score for score in scores], rel=1e-4)
    assert again == scores, "linears of one shape are scored together, and each gets its own"
    assert between == LQLoRA().candidate_errors([other], spec)[0]
    assert len(between) == 2


def test_linears_of_one_shape_are_decomposed_together_and_end_one_by_one() -> None:
    """Each as alone, with its own configuration, information and number of iterations."""
    weights = torch.stack([layer(seed=seed) for seed in range(3)])
    schemes = [(SCHEME.model_copy(update={"bits": bits}), ABSMAX) for bits in (2, 3, 4)]
    known = [RankOne.of(fisher_of(weight)[0] if index else None, weight) for index, weight in enumerate(weights)]
    together = decompose_all(weights, schemes, known, rank=8, iterations=30, seed=0)
    assert len({len(each.errors) for each in together}) > 1
    for weight, (scheme, absmax), information, found in zip(weights, schemes, known, together, strict=True):
        single = decompose(weight, scheme, absmax, information, rank=8, iterations=30, seed=0)
        assert found.errors == pytest.approx(single.errors, rel=1e-3)
        assert torch.equal(found.base.codes, single.base.codes)
        torch.testing.assert_close(found.left @ found.right, single.left @ single.right, rtol=1e-3, atol=1e-6)


def test_some_rows_stand_for_all_of_a_larger_linear() -> None:
    """Roughly, and by the same factor for every candidate; of a small one all rows are looked at."""
    assert torch.equal(scored_rows(SCORED_ROWS), torch.arange(SCORED_ROWS))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(700, 96, generator=generator) * torch.rand(700, 1, generator=generator)
    fisher = Fisher(torch.rand(700, generator=generator).double() + 0.5, torch.rand(96, generator=generator).double())
    rows, part = scored_rows(700), RankOne.of(fisher, weight)
    assert len(rows) == SCORED_ROWS
    assert all(len(scored_rows(count).unique()) == SCORED_ROWS for count in range(SCORED_ROWS, 400))
    found, exact = [], []
    for bits in (2, 3, 4):
        rest = weight - quantize(weight, SCHEME.model_copy(update={"bits": bits}), ABSMAX).dequantize()
        exact.append(float(part.error(rest)) ** 2)
        found.append(float(part.standing_for_all(rows).error(rest[rows])) ** 2)
    assert found == pytest.approx(exact, rel=0.3)
    ratios = [one / other for one, other in zip(found, exact, strict=True)]
    assert max(ratios) / min(ratios) < 1.1


def test_information_of_zero_is_as_none() -> None:
    weight = layer()
    nothing = Fisher(torch.zeros(48), torch.zeros(64))
    assert torch.equal(RankOne.of(nothing, weight).rows, torch.ones(48))


def test_a_block_s_linears_have_their_own_information_and_second_level() -> None:
    """What the engine found for a linear by name reaches its decomposition; without it, neither is there."""
    task = toy_task({"up": SCHEME, "down": SCHEME})
    weight, chosen = task.linear("up").weight.detach(), AbsmaxScheme(bits=3, dtype="bfloat16", superblock=8)
    fisher, _ = fisher_of(weight)
    spec = LQLoRASpec(bits=2, rank=4, iterations=5)
    known = replace(task, fisher={"up": fisher}, absmax={"up": chosen})
    found, plain = (LQLoRA().quantize_block(of, spec).linears for of in (known, task))
    weights = RankOne.of(fisher, weight)
    expected = decompose(weight, SCHEME, chosen, weights, rank=4, iterations=5, seed=task.seed)
    assert torch.equal(found["up"].weight.codes, expected.base.codes)
    for linears, expected_level in ((found, (3, 8, torch.bfloat16)), (plain, (8, 256, torch.float32))):
        stored = linears["up"].weight
        assert isinstance(stored, CodebookWeight)
        assert isinstance(stored.absmax, QuantizedAbsmax)
        assert (stored.absmax.bits, stored.absmax.superblock, stored.absmax.scale.dtype) == expected_level
    assert torch.equal(found["down"].dequantize(), plain["down"].dequantize())
    of_all = replace(task, absmax={"up": chosen})
    assert not torch.equal(LQLoRA().quantize_block(of_all, spec).linears["up"].weight.codes, found["up"].weight.codes)


def test_rows_are_scored_by_sixty_four_in_strips_of_sixteen() -> None:
    assert scored_rows(64).tolist() == list(range(64))
    starts = (0, 45, 89, 134)  # (150 - 16) / 3 apart
    assert scored_rows(150).tolist() == [start + row for start in starts for row in range(16)]
