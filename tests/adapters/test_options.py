"""Every option of every adapter does something, and the constants of gates are those that are documented."""

from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.adapters import ADAPTERS, AdapterSpec, BayesianLoRASpec, LoRASpec, QALoRASpec
from app.domain.methods import Scheme
from bitwright.errors import CorruptCheckpoint
from tests.adapters.examples import SPECS
from tests.formats.examples import Made, codebook_made, random_result
from workers.adapters.attaching import Attach, report
from workers.adapters.bayesian import BayesianLoRA
from workers.adapters.gates import sample
from workers.adapters.grouped import GroupedAdapter
from workers.numerics.quantized import LinearResult

SHAPES = {"up": (48, 64), "down": (64, 128)}
SCHEME = Scheme(bits=4, group_size=32, symmetric=True)

OTHER: dict[str, Any] = {
    "rank": 5,
    "alpha": 5.0,
    "dropout": 0.5,
    "pooling": "sum",
    "pool_in": 64,
    "repeat_out": 8,
    "penalty": 0.7,
    "gate_learning_rate": 0.5,
}
"""Another value than the default's for each option; `kind` is none, it says which class the adapter has."""


def bases(made: Made | Scheme = SCHEME) -> dict[str, LinearResult]:
    return {name: random_result(shape, made, torch.float32, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}


def behaviour(spec: AdapterSpec) -> list[Tensor]:
    """What training and its end can see of the adapters of a spec, as numbers."""
    adapters, seen = Attach(spec)(bases(), seed=1), list[Tensor]()
    torch.manual_seed(0)
    for name, adapter in adapters.items():
        for key, parameter in adapter.named_parameters():
            if key in ("b", "m"):
                parameter.data = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        x = torch.linspace(-1, 1, 3 * SHAPES[name][1]).view(3, -1)
        seen += [adapter.train()(x).detach(), adapter.eval()(x).detach(), torch.tensor(list(adapter.rates.values()))]
    penalty = type(next(iter(adapters.values()))).penalty(list(adapters.values()))
    return [*seen, torch.zeros(()) if penalty is None else penalty.detach()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIONS = [(kind, name) for kind, info in ADAPTERS.items() for name in info.spec.model_fields if name != "kind"]


@pytest.mark.parametrize(("kind", "option"), OPTIONS)
def test_every_option_of_every_adapter_changes_what_it_computes(kind: str, option: str) -> None:
    assert option in OTHER, f"say here what else {option} may be"
    spec: Any = ADAPTERS[kind].spec
    assert getattr(spec(), option) != OTHER[option]
    assert same(behaviour(spec()), behaviour(spec()))
    assert not same(behaviour(spec()), behaviour(spec(**{option: OTHER[option]})))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dropout_drops_the_share_that_is_asked_for_and_nothing_in_evaluation(kind: str) -> None:
    spec: Any = ADAPTERS[kind].spec(dropout=0.25)
    adapter: Any = Attach(spec)(bases(), seed=1)["up"]
    torch.manual_seed(0)
    dropped = adapter.train().dropout(torch.ones(40_000))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.max()) == pytest.approx(4 / 3)
    assert torch.equal(adapter.eval().dropout(torch.ones(100)), torch.ones(100))


def test_a_lora_that_goes_on_from_factors_has_the_dropout_of_the_request_and_their_strength() -> None:
    """Rank and alpha are those of the factors, whatever the request says."""
    made = bases(codebook_made(3, 32, rank=5))
    for adapter in Attach(LoRASpec(rank=7, alpha=3.0, dropout=0.25))(made, seed=1).values():
        assert isinstance(adapter, GroupedAdapter)
        assert adapter.dropout.p == 0.25
        assert (adapter.shape.rank, adapter.shape.alpha, adapter.shape.scale) == (5, 16.0, 16 / 5)


def test_the_classes_of_adapters_are_these() -> None:
    made = {spec.kind: type(Attach(spec)(bases(), seed=1)["up"]).__name__ for spec in SPECS}
    assert made == {
        "lora": "GroupedAdapter",
        "qa-lora": "GroupedAdapter",
        "q-bara": "GroupedAdapter",
        "qa-hira": "GroupedAdapter",
        "qa-blora": "GroupedAdapter",
        "bayesian-lora": "BayesianLoRA",
    }


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_trained_parameters_are_taken_over_or_refused(spec: AdapterSpec) -> None:
    results = bases()
    trained = {
        name: {key: torch.full_like(tensor, 0.5) for key, tensor in adapter.state_dict().items()}
        for name, adapter in Attach(spec)(results, seed=1).items()
    }
    for name, adapter in Attach(spec, trained)(results, seed=2).items():
        assert all(torch.equal(tensor, trained[name][key]) for key, tensor in adapter.state_dict().items())
    key, tensor = next(iter(trained["up"].items()))
    damaged: tuple[dict[str, Tensor], ...] = (
        {},
        {key: tensor},
        trained["up"] | {key: tensor.half()},
        trained["up"] | {key: tensor[:-1]},
    )
    for other in damaged:
        if other.keys() == trained["up"].keys() and other[key] is tensor:
            continue  # an adapter of one parameter
        with pytest.raises(CorruptCheckpoint, match="adapter of up has other tensors"):
            Attach(spec, trained | {"up": other})(results, seed=2)
    with pytest.raises(CorruptCheckpoint, match="adapter of down"):
        Attach(spec, {"up": trained["up"]})(results, seed=2)


# ---- Gates -----------------------------------------------------------------------------------------------------------


def gated(**fields: Any) -> BayesianLoRA:
    return BayesianLoRA(BayesianLoRASpec(rank=4, **fields), 32, 24, generator=torch.Generator().manual_seed(0))


def test_gates_start_open_and_have_rates_of_their_own() -> None:
    adapter = gated(gate_learning_rate=0.3)
    for gate in (adapter.gate_rank, adapter.gate_a, adapter.gate_b):
        assert gate.tolist() == [6.0] * len(gate)
    assert (len(adapter.gate_rank), len(adapter.gate_a), len(adapter.gate_b)) == (4, 3, 3)
    assert (float(adapter.range_a.detach()), float(adapter.range_b.detach())) == (0, 0)
    assert adapter.rates == {"gate_rank": 0.3, "gate_a": 0.3, "gate_b": 0.3, "range_a": 0.02, "range_b": 0.02}
    assert adapter.pass_bytes == 60


def test_a_factor_of_zeros_has_a_range_and_stays_zero() -> None:
    left = gated().compact()
    assert float(left.b_step) == pytest.approx(2e-6 / 65_535, rel=1e-6)
    assert not left.b_codes.any()
    low_rank = left.low_rank()
    assert low_rank is not None
    assert not low_rank.product().any()


def test_each_draw_of_the_gates_is_another_and_each_gate_has_its_own() -> None:
    torch.manual_seed(3)
    first, second = sample(torch.zeros(64)), sample(torch.zeros(64))
    assert not torch.equal(first, second)
    assert len(first.unique()) > 10
    torch.manual_seed(3)
    assert torch.equal(sample(torch.zeros(64)), first)


def test_gates_open_and_drawn_while_training_are_decided_in_evaluation() -> None:
    """Also of adapters that compute together."""
    adapters = [gated(), gated()]
    x = torch.linspace(-1, 1, 96).view(3, 32)
    for adapter in adapters:
        adapter.b.data = torch.linspace(-1, 1, 96).view(24, 4)
        adapter.gate_rank.data = torch.tensor([6.0, 0.0, -0.9, -6.0])
        adapter.eval()
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with BayesianLoRA.together(adapters):
            outputs += [adapter(x).detach() for adapter in adapters]
        outputs.append(adapters[0](x).detach())
    exact = x.double() @ adapters[0].delta_weight().detach().T
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert (outputs[0].double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    adapters[0].train()
    torch.manual_seed(1)
    drawn = adapters[0](x).detach()
    assert not torch.equal(drawn, outputs[0])
    assert not torch.equal(drawn, adapters[0](x).detach())


def test_gates_held_may_move_again_and_only_gates_are_held() -> None:
    adapter = gated()
    for share, held in ((0.0, False), (0.699, False), (0.7, True), (1.0, True), (0.1, False)):
        adapter.progress(share)
        assert adapter.settled is held
        still = {name for name, parameter in adapter.named_parameters() if not parameter.requires_grad}
        assert still == ({"gate_rank", "gate_a", "gate_b"} if held else set())


def test_the_report_of_a_job_counts_every_linear() -> None:
    spec = QALoRASpec(rank=4)
    told = report(spec, Attach(spec)(bases(), seed=1), bases())
    # Pairs between 64/32 and 48, and between 128/32 and 64; a LoRA of that rank has whole inputs.
    assert (told.kind, told.rank, told.inner_ranks) == ("qa-lora", 4, (4, 4))
    assert told.parameters == 4 * (2 + 48) + 4 * (4 + 64)
    assert told.parameters_lora == 4 * (64 + 48) + 4 * (128 + 64)
    assert told.bits_per_weight == pytest.approx(32 * told.parameters / (48 * 64 + 64 * 128))
