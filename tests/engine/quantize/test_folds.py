"""Every kind of block with folds: scales that move between neighbours change nothing that the model computes."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tests.engine.model.random_models import LENGTH, PECULIARITIES, VOCABULARY, random_model
from workers.contracts.blocks import Fold
from workers.engine.model.layouts import layout_of
from workers.methods.awq import settle


@torch.no_grad()
def fold(block: nn.Module, place: Fold, generator: torch.Generator) -> bool:
    """Moves random scales; False where the source has another number of outputs than the linears have inputs."""
    source = block.get_submodule(place.source)
    linears = [block.get_submodule(name) for name in place.linears]
    columns = linears[0].get_parameter("weight").shape[1]
    if isinstance(source, nn.Linear) and source.out_features != columns:
        return False
    wanted = torch.rand(columns, dtype=torch.float64, generator=generator) * 3 + 0.2
    scale, changed = settle(block, place, wanted)
    for name, value in changed.items():
        block.get_parameter(name).copy_(value)
    if isinstance(source, nn.Linear):
        source.weight /= scale.unsqueeze(1)
    for linear in linears:
        linear.get_parameter("weight").mul_(scale)
    return True


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.fixture(autouse=True)
def exact_gemma_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms multiply in fp32 whatever the model's dtype; here in the model's."""
    monkeypatch.setattr(Gemma3RMSNorm, "forward", lambda norm, x: norm._norm(x) * (1.0 + norm.weight))


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}], ids=str)
@pytest.mark.parametrize("architecture", PECULIARITIES)
def test_moved_scales_change_no_logit(architecture: str, shape: dict[str, int]) -> None:
    model = random_model(architecture, dtype=torch.float64, **shape)
    before, generator = logits(model), torch.Generator().manual_seed(2)
    layout = layout_of(model)
    folds, blocks = layout.folds, model.get_submodule(layout.blocks)
    assert folds
    moved = [fold(block, place, generator) for block in blocks.children() for place in folds]
    assert moved == [place.source != "self_attn.v_proj" or bool(shape) for _ in blocks.children() for place in folds]
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", PECULIARITIES)
def test_every_linear_of_a_block_gets_scales_and_each_part_is_there(architecture: str) -> None:
    model = random_model(architecture)
    layout = layout_of(model)
    block = next(model.get_submodule(layout.blocks).children())
    named = [name for place in layout.folds for name in place.linears]
    assert sorted(named) == sorted(n for n, m in block.named_modules() if isinstance(m, nn.Linear))
    for place in layout.folds:
        assert block.get_submodule(place.measured) is not block
        assert set(place.unclipped) <= set(place.linears)


def test_a_norms_offset_matters() -> None:
    """With the plain norm's rule, Gemma's logits change: the test above can fail."""
    model = random_model("gemma3_text", dtype=torch.float64)
    before, blocks = logits(model), model.get_submodule("model.layers")
    plain = Fold("input_layernorm", layout_of(model).folds[0].linears, "self_attn")
    assert fold(next(blocks.children()), plain, torch.Generator().manual_seed(2))
    assert (logits(model) - before).abs().max() > 1e-3
