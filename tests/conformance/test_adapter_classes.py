"""Every kind of adapter as training, merging, files and the report meet it; a new kind needs a spec in `SPECS`."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch

from app.domain.adapters import ADAPTERS, AdapterSpec
from app.domain.methods import Scheme
from bitwright.errors import BitwrightError, CorruptCheckpoint
from tests.adapters.examples import SPECS
from tests.formats.examples import random_result
from workers.adapters.adapter import Adapter
from workers.adapters.attaching import CLASSES, Attach, report
from workers.numerics.quantized import LinearResult

SHAPES = {"up": (48, 64), "down": (64, 96)}
BASE = Scheme(bits=4, group_size=16, symmetric=False)
every_kind = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)


def bases() -> dict[str, LinearResult]:
    return {name: random_result(shape, BASE, torch.float32, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}


def attached(spec: AdapterSpec, seed: int = 1) -> dict[str, Adapter]:
    return Attach(spec)(bases(), seed)


def trained(spec: AdapterSpec) -> dict[str, Adapter]:
    """After training, as far as factors that start at 0 are concerned; in evaluation mode."""
    adapters, generator = attached(spec), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters.values():
            for name, parameter in adapter.named_parameters():
                if name in ("b", "m"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return {name: adapter.eval() for name, adapter in adapters.items()}


def inputs(name: str) -> torch.Tensor:
    return torch.randn(2, 5, SHAPES[name][1], generator=torch.Generator().manual_seed(4))


def total_loss(adapters: Sequence[Adapter], xs: Sequence[torch.Tensor]) -> torch.Tensor:
    kind = type(adapters[0])
    with kind.together(adapters):
        losses = [(adapter(x) - 1).square().mean() for adapter, x in zip(adapters, xs, strict=True)]
    penalty = kind.penalty(adapters)
    return torch.stack(losses).sum() + (0 if penalty is None else penalty)


def test_every_kind_of_a_request_has_a_class_and_an_example() -> None:
    assert CLASSES.keys() == ADAPTERS.keys() == {spec.kind for spec in SPECS}


@every_kind
def test_training_starts_at_the_base(spec: AdapterSpec) -> None:
    for name, adapter in attached(spec).items():
        x = inputs(name)
        assert adapter(x).shape == (*x.shape[:-1], SHAPES[name][0])
        assert not adapter(x).any()
        assert adapter(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@every_kind
def test_steps_lower_the_loss_from_the_first_share_of_training_to_the_last(spec: AdapterSpec) -> None:
    adapters = list(attached(spec).values())
    xs = [inputs(name) for name in SHAPES]
    own = {key for adapter in adapters for key in adapter.rates}
    assert own <= {key for key, _ in adapters[0].named_parameters()}
    optimizer = torch.optim.Adam([p for adapter in adapters for p in adapter.parameters()], lr=0.02)
    losses = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        for adapter in adapters:
            adapter.progress(share)
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = total_loss(adapters, xs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@every_kind
def test_together_they_compute_what_each_computes_alone(spec: AdapterSpec) -> None:
    adapters = list(trained(spec).values())
    xs = [inputs(name) for name in SHAPES]
    alone = [adapter(x) for adapter, x in zip(adapters, xs, strict=True)]
    with type(adapters[0]).together(adapters):
        side_by_side = [adapter(x) for adapter, x in zip(adapters, xs, strict=True)]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(alone, side_by_side, strict=True))


@every_kind
def test_the_dense_update_the_factors_and_the_forward_pass_are_one(spec: AdapterSpec) -> None:
    for name, adapter in trained(spec).items():
        factors, x = adapter.low_rank(), inputs(name)
        assert factors is not None
        delta = adapter.delta_weight()
        assert delta.abs().max() > 0
        torch.testing.assert_close(factors.product().double(), delta, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter(x).double(), x.double() @ delta.T, rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(delta) <= adapter.inner_rank


@every_kind
def test_a_kind_that_merges_has_one_number_per_group_and_another_refuses(spec: AdapterSpec) -> None:
    for adapter in trained(spec).values():
        if not ADAPTERS[spec.kind].merges_quantized:
            with pytest.raises(BitwrightError):
                adapter.group_delta(16)
            continue
        delta = adapter.group_delta(16).repeat_interleave(16, 1)
        torch.testing.assert_close(delta, adapter.delta_weight(), rtol=1e-12, atol=1e-15)


@every_kind
def test_facts_for_the_file_and_the_report_are_its_own(spec: AdapterSpec) -> None:
    adapters = trained(spec)
    for adapter in adapters.values():
        facts, tensors = adapter.stored()
        assert facts["rank"] == adapter.inner_rank
        assert {"form", "pool_in", "repeat_out", "scale"} <= facts.keys()
        assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors.values())
        assert sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values()) >= adapter.stored_bits > 0
        assert adapter.flops_per_token > 0
        assert adapter.is_stock == ADAPTERS[spec.kind].stock_peft
    section = report(spec, adapters, bases())
    ranks = [adapter.inner_rank for adapter in adapters.values()]
    assert section.inner_ranks == (min(ranks), max(ranks))
    assert section.flops_per_token == sum(adapter.flops_per_token for adapter in adapters.values())
    weights = sum(out * columns for out, columns in SHAPES.values())
    assert section.bits_per_weight == sum(adapter.stored_bits for adapter in adapters.values()) / weights


@every_kind
def test_parameters_come_back_and_others_are_refused(spec: AdapterSpec) -> None:
    before, after = trained(spec), attached(spec, seed=9)
    for name, adapter in after.items():
        adapter.restore(before[name].state_dict(), name)
        assert torch.equal(adapter.delta_weight(), before[name].delta_weight())
        copy = deepcopy(adapter)
        assert copy.state_dict().keys() == adapter.state_dict().keys()
    with pytest.raises(CorruptCheckpoint, match="other tensors"):
        after["up"].restore(before["down"].state_dict(), "up")


def test_an_adapter_class_answers_for_all_of_its_own() -> None:
    assert Adapter.__abstractmethods__ == {
        "beside",
        "is_stock",
        "inner_rank",
        "stored_bits",
        "flops_per_token",
        "stored",
        "low_rank",
        "delta_weight",
        "group_delta",
    }
