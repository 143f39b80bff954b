"""Bayesian-LoRA: gates and quantizers against plain ones, sizes against a counter, and a task that it learns."""

import pytest
import torch
from torch import Tensor

from app.domain.adapters import AdapterShape, BayesianLoRASpec
from workers.adapters.bayesian import BayesianLoRA, bops_report
from workers.adapters.gates import (
    WIDTHS,
    decide,
    decided_bits,
    expected_bits,
    keep_probability,
    residual_quantize,
    sample,
    step_of,
)
from workers.adapters.grouped import GroupedAdapter

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gates_up_to(bits: int) -> Tensor:
    return torch.tensor([float(width <= bits) for width in WIDTHS[1:]], dtype=F64)


def set_bits(phi: Tensor, bits: int) -> None:
    with torch.no_grad():
        phi.copy_(gates_up_to(bits) * 12 - 6)


def random_adapter(rank: int = 6, seed: int = 0) -> BayesianLoRA:
    adapter = BayesianLoRA(BayesianLoRASpec(rank=rank, alpha=3), 32, 24, generator=generator(seed)).double()
    with torch.no_grad():
        adapter.b.copy_(torch.randn(24, rank, dtype=F64, generator=generator(seed + 1)))
    return adapter


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("limit", [1.0, 0.037])
def test_gates_up_to_k_bits_are_the_uniform_quantizer_of_k_bits(bits: int, limit: float) -> None:
    x = torch.randn(5000, dtype=F64, generator=generator(bits)) * limit
    found = residual_quantize(x, torch.tensor(limit, dtype=F64), gates_up_to(bits))
    step = 2 * limit / (2**bits - 1)
    inside = limit * (1 - 1e-7)
    plain = (x.clamp(-inside, inside) / step).round() * step
    # Where the range is no power of two, 4 ulp of it are a little more than 1e-11 of a step at 16 bits.
    rounding = 0 if limit == 1 else 2 * torch.finfo(F64).eps * limit
    assert (found - plain).abs().max() < max(1e-11 * step, rounding)
    assert len(torch.unique((found / step).round())) <= 2**bits - 1
    assert float(step_of(torch.tensor(limit, dtype=F64), bits)) == pytest.approx(step, rel=1e-15)


def test_two_bits_have_three_levels() -> None:
    levels = residual_quantize(torch.linspace(-2, 2, 101, dtype=F64), torch.tensor(1.0, dtype=F64), gates_up_to(2))
    assert torch.unique(levels.round(decimals=9)).tolist() == pytest.approx([-2 / 3, 0, 2 / 3])


@pytest.mark.parametrize("bits", WIDTHS)
def test_in_fp32_no_code_lies_beyond_the_last(bits: int) -> None:
    x = torch.cat([torch.tensor([-1.0, 1.0, -0.9999999, 0.9999999]), torch.randn(2000, generator=generator(1))])
    found = residual_quantize(x, torch.tensor(1.0), gates_up_to(bits).float())
    codes = (found / step_of(torch.tensor(1.0), bits)).round()
    assert codes.abs().max() == 2 ** (bits - 1) - 1


PROBABILITIES = {6: 0.9995, 2: 0.9734, 0: 0.8318, -1: 0.6453, -2: 0.4010, -6: 0.0121}


@pytest.mark.parametrize(("phi", "probability"), PROBABILITIES.items())
def test_the_probability_of_a_gate_is_the_papers_and_that_of_samples(phi: float, probability: float) -> None:
    assert float(keep_probability(torch.tensor(float(phi)))) == pytest.approx(probability, abs=5e-5)
    torch.manual_seed(0)
    drawn = sample(torch.full((100_000,), float(phi)))
    assert float((drawn > 0).float().mean()) == pytest.approx(probability, abs=0.006)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1


def test_a_gate_is_on_in_the_end_above_minus_0_935() -> None:
    assert decide(torch.tensor([6.0, 0.0, -0.935, -0.936, -2.0])).tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(("phi", "bits"), [((6, 6, 6), 16), ((6, 6, -6), 8), ((6, -6, 6), 4), ((-6, 6, 6), 2)])
def test_a_gate_counts_if_those_below_are_on(phi: tuple[float, ...], bits: int) -> None:
    gates = torch.tensor(phi, dtype=torch.float64)
    assert decided_bits(gates) == bits
    assert float(expected_bits(gates)) == pytest.approx(bits, abs=0.3)


def test_expected_bits_are_the_mean_of_sampled_ones() -> None:
    phi = torch.tensor([0.5, -0.5, -1.0], dtype=F64)
    torch.manual_seed(1)
    on = sample(phi.expand(200_000, 3)) > 0
    more = torch.tensor([2.0, 4.0, 8.0], dtype=F64)
    drawn = 2 + (on.long().cumprod(1) * more).sum(1)
    assert float(expected_bits(phi)) == pytest.approx(float(drawn.mean()), rel=0.005)


def test_gradients_reach_values_range_and_gates() -> None:
    x = torch.tensor([0.2, -0.7, 3.0], requires_grad=True)
    limit, gates = torch.tensor(1.0, requires_grad=True), torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    residual_quantize(x, limit, gates).sum().backward()
    assert x.grad is not None
    assert limit.grad is not None
    assert gates.grad is not None
    assert x.grad.tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert float(limit.grad) == pytest.approx(1, abs=0.01)  # what is clipped follows the range
    assert bool(gates.grad.any())


def test_an_open_adapter_is_plain_lora_to_16_bits() -> None:
    adapter = random_adapter().eval()
    plain = GroupedAdapter(AdapterShape(32, 24, 1, 1, "pair", 6, 3.0, 6)).double()
    plain.load_state_dict({"a": adapter.a, "b": adapter.b})
    x = torch.randn(4, 32, dtype=F64, generator=generator(5))
    assert (adapter(x) - plain(x)).abs().max() <= 1e-3 * plain(x).abs().max()


def test_training_starts_at_the_base_with_a_gradient() -> None:
    adapter = BayesianLoRA(BayesianLoRASpec(rank=4), 32, 24, generator=generator(0))
    x = torch.randn(4, 32, generator=generator(5))
    torch.manual_seed(0)
    assert not adapter(x).detach().any()
    (adapter(x) - 1).square().mean().backward()
    assert adapter.b.grad is not None
    assert bool(adapter.b.grad.any())
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize(("a_bits", "b_bits"), [(4, 8), (2, 16), (8, 4)])
def test_what_is_left_is_integers_that_compute_the_same(a_bits: int, b_bits: int) -> None:
    adapter = random_adapter().eval()
    with torch.no_grad():
        adapter.gate_rank.copy_(torch.tensor([6.0, -6, 6, -2, 6, 0]))
        adapter.range_a.fill_(-0.3)
    set_bits(adapter.gate_a, a_bits)
    set_bits(adapter.gate_b, b_bits)
    left = adapter.compact()
    assert (left.rank, left.a_bits, left.b_bits) == (4, a_bits, b_bits)
    assert left.a_codes.shape == (4, 32)
    assert left.b_codes.shape == (24, 4)
    assert left.a_codes.abs().max() <= 2 ** (a_bits - 1) - 1
    assert left.a_codes.dtype == (torch.int16 if a_bits > 8 else torch.int8)
    assert left.stored_bits() == 4 * (32 * a_bits + 24 * b_bits) + 64
    x = torch.randn(4, 32, dtype=F64, generator=generator(5))
    a, b = left.a_codes.double() * left.a_step.double(), left.b_codes.double() * left.b_step.double()
    by_hand = x @ (b @ a).T * (3 / 6)
    assert (adapter(x) - by_hand).abs().max() <= 1e-6 * by_hand.abs().max()
    assert (adapter.delta_weight() - (b @ a) / 2).abs().max() <= 1e-6
    low_rank = adapter.low_rank()
    assert low_rank is not None
    assert (low_rank.product() - adapter.delta_weight()).abs().max() <= 1e-5


def test_an_adapter_may_vanish() -> None:
    adapter = random_adapter().eval()
    with torch.no_grad():
        adapter.gate_rank.fill_(-6)
    assert adapter.low_rank() is None
    assert not adapter(torch.ones(1, 32, dtype=F64)).any()
    assert adapter.decided_bops() == 0


def test_bit_operations_are_those_of_a_counter() -> None:
    adapters = {"up": random_adapter(6, 1), "down": random_adapter(3, 2)}
    with torch.no_grad():
        adapters["up"].gate_rank[:4] = -6
    set_bits(adapters["up"].gate_a, 4)
    set_bits(adapters["up"].gate_b, 8)
    set_bits(adapters["down"].gate_a, 2)
    report = bops_report(adapters, {"up": 4, "down": 3})
    counted = 0
    for adapter in adapters.values():
        left = adapter.compact()
        counted += sum(16 * left.a_bits for _ in range(left.a_codes.numel()))
        counted += sum(16 * left.b_bits for _ in range(left.b_codes.numel()))
    assert report.adapter == counted
    assert report.adapter_16bit == 16 * 16 * (6 + 3) * (32 + 24)
    assert report.model == counted + 16 * (4 + 3) * 32 * 24
    assert report.model_16bit == report.adapter_16bit + 16 * (4 + 3) * 32 * 24
    assert report.ranks == {"up": 2, "down": 3}
    assert report.bits == {"up": (4, 8), "down": (2, 16)}
    assert report.adapter_saving == pytest.approx(1 - counted / report.adapter_16bit)
    assert 0 < report.model_saving < report.adapter_saving


def test_the_penalty_is_the_share_of_expected_bit_operations() -> None:
    adapters = [random_adapter(6, 1), random_adapter(3, 2)]
    assert sum(adapter.full_bops for adapter in adapters) == 16 * 16 * (6 + 3) * (32 + 24)

    def total() -> float:
        return float(BayesianLoRA.penalty(adapters).detach())

    assert total() == pytest.approx(adapters[0].spec.penalty, rel=0.005)
    with torch.no_grad():
        for adapter in adapters:
            adapter.gate_rank.fill_(-20)
    assert total() < 1e-6
    with torch.no_grad():
        adapters[0].gate_rank.fill_(6)
    adapters[0].progress(0.69)
    assert total() == pytest.approx(adapters[0].spec.penalty * 2 / 3, rel=0.005)
    adapters[0].progress(0.7)
    assert total() < 1e-6


def test_decided_gates_are_deterministic_in_training() -> None:
    adapter = random_adapter()
    x = torch.randn(4, 32, dtype=F64, generator=generator(5))
    with torch.no_grad():
        adapter.gate_rank.fill_(0)
    torch.manual_seed(0)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.progress(1.0)
    assert torch.equal(adapter(x), adapter.eval()(x))
    held = {name for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
    assert held == {"gate_rank", "gate_a", "gate_b"}


def test_adapters_of_several_shapes_compute_together_what_each_computes_alone() -> None:
    """With gates that are certain; parameters get the same gradients."""
    both = [[random_adapter(6, 1), random_adapter(3, 2), random_adapter(6, 3)] for _ in range(2)]
    x = torch.randn(4, 32, dtype=F64, generator=generator(5))
    for adapters in both:
        for index, adapter in enumerate(adapters):
            with torch.no_grad():
                adapter.gate_rank.copy_((torch.arange(len(adapter.gate_rank)) % 3 - 0.5) * 80)
                adapter.gate_a[index:] = -40
                adapter.range_b.fill_(0.1 * index)
    alone, together = both
    loss = torch.stack([adapter(x).square().sum() for adapter in alone]).sum()
    loss.backward()
    with BayesianLoRA.together(together):
        same = torch.stack([adapter(x).square().sum() for adapter in together]).sum()
    same.backward()
    assert float(loss.detach()) == pytest.approx(float(same.detach()), rel=1e-12)
    for one, other in zip(alone, together, strict=True):
        for (name, mine), its in zip(one.named_parameters(), other.parameters(), strict=True):
            assert mine.grad is not None, name
            assert its.grad is not None, name
            assert torch.allclose(mine.grad, its.grad, rtol=1e-10, atol=1e-12), name


def test_a_sample_lasts_as_long_as_adapters_compute_together() -> None:
    adapter, x = random_adapter(), torch.randn(4, 32, dtype=F64, generator=generator(5))
    with torch.no_grad():
        adapter.gate_rank.fill_(0)
    torch.manual_seed(0)
    with BayesianLoRA.together([adapter]):
        first = adapter(x)
        assert torch.equal(adapter(x), first)
    with BayesianLoRA.together([adapter]):
        assert not torch.equal(adapter(x), first)
    assert not torch.equal(adapter(x), adapter(x))


def _fit(adapter: BayesianLoRA | GroupedAdapter, data: tuple[Tensor, Tensor], steps: int = 500) -> None:
    rates = adapter.rates if isinstance(adapter, BayesianLoRA) else {}
    groups = [{"params": [p], "lr": rates.get(name, 1e-2)} for name, p in adapter.named_parameters()]
    optimizer, x, y = torch.optim.Adam(groups), *data
    for step in range(steps):
        rows = torch.randint(0, len(x), (128,), generator=generator(step))
        loss = (adapter(x[rows]) - y[rows]).square().mean()
        if isinstance(adapter, BayesianLoRA):
            adapter.progress(step / steps)
            loss = loss + BayesianLoRA.penalty([adapter])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_penalty_saves_most_bit_operations_at_nearly_the_same_loss() -> None:
    """An update of rank 2 and noise, learned with rank 8: plain LoRA against gates, on samples that neither saw."""
    truth = torch.randn(24, 2, generator=generator(1)) @ torch.randn(2, 32, generator=generator(2)) * 0.25
    x = torch.randn(3000, 32, generator=generator(3))
    y = x @ truth.T + torch.randn(3000, 24, generator=generator(4)) * 0.7
    train, held_out = (x[:2000], y[:2000]), (x[2000:], y[2000:])
    torch.manual_seed(0)
    plain = GroupedAdapter(AdapterShape(32, 24, 1, 1, "pair", 8, 8.0, 8), generator=generator(5))
    gated = BayesianLoRA(BayesianLoRASpec(rank=8, alpha=8, penalty=0.3), 32, 24, generator=generator(5))
    _fit(plain, train)
    _fit(gated, train)
    with torch.no_grad():
        losses = [float((m.eval()(held_out[0]) - held_out[1]).square().mean()) for m in (plain, gated)]
    untrained = float(held_out[1].square().mean())
    assert losses[0] < 0.2 * untrained
    assert losses[1] <= 1.03 * losses[0]
    report = bops_report({"only": gated}, {"only": 4})
    assert report.adapter_saving >= 0.6


def test_what_no_task_needs_is_pruned() -> None:
    x = torch.randn(500, 32, generator=generator(3))
    gated = BayesianLoRA(BayesianLoRASpec(rank=4, penalty=1), 32, 24, generator=generator(5))
    torch.manual_seed(0)
    _fit(gated, (x, torch.zeros(500, 24)))
    assert gated.compact().rank == 0
