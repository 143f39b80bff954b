"""Experts as linears of their own compute what transformers' eager experts do, and read what is theirs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from app.domain.inputs.left_alone import left_alone
from tests.engine.model.families import EXPERTS, MIXTURES, TOP_K, save_small_model
from tests.engine.model.test_names import fused_file, layers_of
from workers.contracts.experts import all_called, experts_of
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.experts import Experts, unfuse
from workers.engine.model.names import Names

IDS = torch.randint(0, 64, (3, 30), generator=torch.Generator().manual_seed(5))
FEW = ("qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3", "nemotron_h", "granitemoe")
"""One of each layout, and of each way to route."""
FAMILIES = [
    pytest.param(family, marks=() if family in FEW else pytest.mark.slow)
    for family in (*MIXTURES, "qwen3_next", "qwen3_5_moe_text", "granitemoehybrid", "jamba")
]
pytestmark = pytest.mark.filterwarnings("ignore")


def unfused(folder: Path) -> tuple[PreTrainedModel, Names]:
    """The checkpoint's model with its experts one by one, and every weight from the file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    names = Names.of(model, Checkpoint.open(folder), layers_of(model))
    names = names.with_slices(unfuse(real, layers_of(real)))
    read = names.reader()
    for name in [*names.parameters, *names.tied]:
        owner, _, leaf = name.rpartition(".")
        module = real.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(read(name), requires_grad=False)
        else:
            module._buffers[leaf] = read(name)
    return real, names


def eager(model: PreTrainedModel) -> Tensor:
    """Logits by transformers' loop over the experts."""
    model.config._experts_implementation = "eager"
    model.config.get_text_config()._experts_implementation = "eager"
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def calls_of(model: PreTrainedModel) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
    """What each module of experts is called with on the eager path, and gives."""
    calls = {}
    handles = [
        module.register_forward_hook(lambda _, given, made, name=name: calls.update({name: (given, made)}))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    eager(model)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("save", [save_small_model, fused_file])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_one_by_one_are_the_eager_path(
    family: str, save: Callable[[Path, str], PreTrainedModel], tmp_path: Path
) -> None:
    calls = calls_of(original := save(tmp_path, family))
    model, _ = unfused(tmp_path)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    assert found.keys() == calls.keys() != set()
    with torch.no_grad():
        for name, (given, made) in calls.items():
            assert off(found[name](*given), made) < 1e-5, name
        assert off(model(IDS, use_cache=False).logits, eager(original)) < 1e-4


def gate_and_up_exchanged(experts: Experts) -> None:
    for expert in range(experts.number):
        gate, up = experts.linear(expert, "gate_proj"), experts.linear(expert, "up_proj")
        gate.weight, up.weight = up.weight, gate.weight


def two_experts_exchanged(experts: Experts) -> None:
    experts._modules["1"], experts._modules["10"] = experts._modules["10"], experts._modules["1"]


@pytest.mark.parametrize("plant", [gate_and_up_exchanged, two_experts_exchanged])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_planted_fault_shows(plant: Callable[[Experts], None], family: str, tmp_path: Path) -> None:
    calls = calls_of(save_small_model(tmp_path, family))
    model, _ = unfused(tmp_path)
    name, (given, made) = next(iter(calls.items()))
    experts = model.get_submodule(name)
    assert isinstance(experts, Experts)
    plant(experts)
    with torch.no_grad():
        assert off(experts(*given), made) > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe", "llama4_text", "gemma4_moe"])
def test_tokens_are_counted_and_routers_are_no_linears_to_quantize(family: str, tmp_path: Path) -> None:
    save_small_model(tmp_path, family)
    model, _ = unfused(tmp_path)
    parts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for part in parts.values():
        part.seen = torch.zeros(part.number, dtype=torch.int64)
    eager(model)
    for name, part in parts.items():
        assert part.seen is not None
        places = 2 if family == "phimoe" else TOP_K
        assert int(part.seen.sum()) == places * IDS.numel(), name
    block = model.get_submodule(layers_of(model))[-1]
    inside = [n for n, module in block.named_modules() if isinstance(module, nn.Linear) and not left_alone(n)]
    assert all(f".{e}.{p}" in " ".join(inside) for e in (0, EXPERTS - 1) for p in ("gate_proj", "up_proj", "down_proj"))
    assert not {"gate", "router", "shared_expert_gate"} & {part for name in inside for part in name.split(".")}


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_an_expert_that_is_called_on_every_token_gives_the_same(family: str, tmp_path: Path) -> None:
    calls = calls_of(save_small_model(tmp_path, family))
    model, _ = unfused(tmp_path)
    name, (given, made) = next(iter(calls.items()))
    part = experts_of(model)[name]
    rows: dict[str, int] = {}
    for path, module in part.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, x, path=path: rows.update({path: len(x[0])}))
    with torch.no_grad(), all_called(part):
        assert off(part(*given), made) < 1e-5
    assert len(rows) == 3 * EXPERTS
    assert min(rows.values()) >= IDS.numel()
    assert not part.complete


def test_gradients_are_those_of_the_eager_path(tmp_path: Path) -> None:
    original = save_small_model(tmp_path, "qwen3_moe", dtype=torch.float64)
    ((given, _), *_), names = calls_of(original).values(), list(calls_of(original))
    model, _ = unfused(tmp_path)
    ours, theirs = model.get_submodule(names[0]), original.get_submodule(names[0])
    found = []
    for module in (ours, theirs):
        hidden, chosen, weights = (tensor.detach().clone() for tensor in given)
        hidden.requires_grad_()
        weights.requires_grad_()
        module.double()(hidden, chosen, weights).square().sum().backward()
        found.append((hidden.grad, weights.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)
