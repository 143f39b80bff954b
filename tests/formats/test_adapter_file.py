"""The adapter file through its own loader, copied out of the package: the same updates, attached and merged."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from app.domain.adapters import AdapterSpec, BayesianLoRASpec, LoRASpec, QABLoRASpec, QAHiRASpec, QALoRASpec, QBaRASpec
from app.domain.methods import Scheme
from tests.formats.examples import REPORT, random_result
from tests.reports import REPORTS
from workers.adapters.attaching import Attach, stored
from workers.adapters.bayesian import BayesianLoRA
from workers.adapters.grouped import GroupedAdapter
from workers.formats.adapter_file import describe_adapter, write_adapter

SHAPES = {"layer.up": (48, 64), "layer.down": (64, 48)}
SPECS: list[AdapterSpec] = [
    LoRASpec(rank=4),
    QALoRASpec(rank=4, pooling="sum"),
    QBaRASpec(rank=4),
    QAHiRASpec(rank=2),
    QABLoRASpec(rank=3),
    BayesianLoRASpec(rank=4),
]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"up": nn.Linear(64, 48), "down": nn.Linear(48, 64)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer["down"](self.layer["up"](x))
        return found


def trained(spec: AdapterSpec) -> dict[str, nn.Module]:
    scheme = Scheme(bits=4, group_size=16, symmetric=True)
    results = {name: random_result(shape, scheme, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    adapters = Attach(spec)(results, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters.values():
            for name, parameter in adapter.named_parameters():
                if name in ("a", "b", "m"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if isinstance(adapter, BayesianLoRA):
                adapter.gate_rank[0] = -6
                adapter.gate_a[1] = -6
    return {name: adapter.eval() for name, adapter in adapters.items()}


def loader(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("copied_loader", folder / "load_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_loader_gives_what_was_trained(spec: AdapterSpec, tmp_path: Path) -> None:
    adapters = trained(spec)
    write_adapter(tmp_path / "adapter", spec.kind, {name: stored(adapter) for name, adapter in adapters.items()})
    load, model = loader(tmp_path / "adapter"), Pair()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = model(x)
        inner = model.layer["up"](x) + adapters["layer.up"](x)
        expected = model.layer["down"](inner) + adapters["layer.down"](inner)
        detach = load.attach(model, tmp_path / "adapter")
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        detach()
        assert torch.equal(model(x), plain)
        load.merge(model, tmp_path / "adapter")
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, (linear, matrices) in load.read(tmp_path / "adapter").items():
        adapter = adapters[name]
        assert isinstance(adapter, GroupedAdapter | BayesianLoRA)
        exact = adapter.delta_weight()
        assert (load.update(linear, matrices) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_the_header_says_what_the_tensors_mean(tmp_path: Path) -> None:
    adapters = trained(QAHiRASpec(rank=2, pool_in=16, repeat_out=4))
    write_adapter(tmp_path, "qa-hira", {name: stored(adapter) for name, adapter in adapters.items()})
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as file:
        (told,) = [json.loads(entry) for entry in file.metadata().values()]
        assert set(file.keys()) == {"layer.up.m", "layer.down.m"}
    assert (told["version"], told["kind"]) == ("1", "qa-hira")
    linear = told["linears"]["layer.up"]
    assert (linear["form"], linear["pool_in"], linear["repeat_out"], linear["scale"]) == ("single", 16, 4, 8.0)
    files = describe_adapter(tmp_path, "qa-hira", REPORT)
    assert [file.name for file in files] == ["README.md", "adapter.safetensors", "load_adapter.py", *REPORTS]


def test_an_adapter_without_ranks_has_no_tensors(tmp_path: Path) -> None:
    adapters = trained(BayesianLoRASpec(rank=2))
    gone = adapters["layer.up"]
    assert isinstance(gone, BayesianLoRA)
    with torch.no_grad():
        gone.gate_rank.fill_(-6)
    write_adapter(tmp_path, "bayesian-lora", {name: stored(adapter) for name, adapter in adapters.items()})
    assert loader(tmp_path).read(tmp_path).keys() == {"layer.down"}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not those of the form"):
        write_adapter(tmp_path / "one", "lora", {"x": ({"form": "pair"}, {"m": torch.zeros(1)})})
    write_adapter(tmp_path / "two", "lora", {})
    load = loader(tmp_path / "two")
    setattr(load, "VERSION", "2")  # noqa: B010 - a module without types
    with pytest.raises(ValueError, match="version 2"):
        load.read(tmp_path / "two")
