"""Hand-fused parts against transformers' own modules: the same outputs and gradients, module by module and whole."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from app.domain.methods import Scheme
from tests.methods.toy_block import toy_task
from workers.engine.model.block_calls import BlockCall
from workers.engine.tune.gradient_linear import GradientLinear
from workers.engine.tune.tuned_block import TunedBlock
from workers.methods.sign_round import rounded_weights

pytest.importorskip("triton")
from workers.engine.model.fused_blocks import FusedBlock, Parts, fuse
from workers.numerics.backends import block_kernels

SCHEME = Scheme(bits=4, group_size=16, symmetric=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
KERNELS = Parts.kernels()
PARTS = [pytest.param(KERNELS, id="kernels"), pytest.param(Parts.operators(), id="operators")]
BLOCKS = [
    pytest.param(LlamaConfig, LlamaDecoderLayer, id="llama"),
    pytest.param(MistralConfig, MistralDecoderLayer, id="mistral"),
    pytest.param(Qwen2Config, Qwen2DecoderLayer, id="qwen2"),
    pytest.param(Qwen3Config, Qwen3DecoderLayer, id="qwen3"),
]


@pytest.mark.parametrize(("config_class", "block_class"), BLOCKS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_fused_block_equals_the_models_own(config_class: Any, block_class: Any, parts: Parts) -> None:
    torch.manual_seed(0)
    config = config_class(**SIZES, attn_implementation="sdpa")
    block = block_class(config, 0).to(DEVICE).float()
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fused = fuse(copy.deepcopy(block), parts)
    assert isinstance(fused, FusedBlock)
    assert dict(fused.named_parameters()).keys() == dict(block.named_parameters()).keys()
    hidden = torch.randn(2, 7, 48, device=DEVICE)
    angles = LlamaRotaryEmbedding(LlamaConfig(**SIZES)).to(DEVICE)(hidden, torch.arange(7, device=DEVICE)[None])
    results = []
    for module in (block, fused):
        x = hidden.clone().requires_grad_()
        y = module(x, position_embeddings=angles, attention_mask=None)
        y = y[0] if isinstance(y, tuple) else y
        module.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)).sum().backward()
        linears = {n: p.grad for n, p in module.named_parameters() if "proj" in n}
        results.append((y.detach(), x.grad, linears))
    (y, x_grad, grads), (y_fused, x_grad_fused, grads_fused) = results
    torch.testing.assert_close(y_fused, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_grad_fused, x_grad, rtol=1e-4, atol=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(grads_fused[name], gradient, rtol=1e-4, atol=1e-4)


def test_what_is_not_known_stays() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    assert fuse(block, KERNELS) is block
    other = LlamaDecoderLayer(LlamaConfig(**SIZES, hidden_act="gelu"), 0)
    assert fuse(other, KERNELS) is other


@pytest.mark.parametrize(("config_class", "block_class"), BLOCKS)
@pytest.mark.parametrize("parts", PARTS)
def test_linears_that_are_joined_give_the_gradients_of_single_ones(
    config_class: Any, block_class: Any, parts: Parts
) -> None:
    """The whole tuned block: flat weights, joined products, the sum left to the loss; autograd of the model's own."""
    torch.manual_seed(0)
    config = config_class(**SIZES, attn_implementation="sdpa")
    block = block_class(config, 0).to(DEVICE).float().requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "bias" in name:
            nn.init.uniform_(parameter, -1, 1)
    hidden = torch.randn(4, 7, 48, device=DEVICE)
    angles = LlamaRotaryEmbedding(LlamaConfig(**SIZES)).to(DEVICE)(hidden, torch.arange(7, device=DEVICE)[None])
    call = BlockCall((), {"position_embeddings": angles, "attention_mask": None})
    schemes = {n: SCHEME for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    base = toy_task({})
    targets = torch.randn_like(hidden)
    task = replace(base, block=block, forward=call, schemes=schemes, inputs=hidden, targets=targets)
    task = replace(task, device=torch.device(DEVICE))
    weights = rounded_weights(replace(task, block=fuse(copy.deepcopy(block), parts)), search=False)
    tuned = TunedBlock.of(replace(task, block=fuse(copy.deepcopy(block), parts)), weights)
    assert isinstance(tuned.module, FusedBlock)
    weights[0].write(tuned.flats[0].value)
    joined = [m.joined for m in tuned.module.modules() if getattr(m, "together", ())]
    assert len(joined) == 1 + parts.packs_gate_up
    assert None not in joined
    index = torch.tensor([2, 0], device=DEVICE)
    residual_and_update = call(tuned.module.residual_and_update, block_kernels.take_rows(hidden, index))
    loss, gradient = block_kernels.square_error(residual_and_update, targets, index, 0.5, 2.0)
    torch.autograd.backward(residual_and_update, [gradient, gradient])
    written = dict(tuned.module.named_parameters())
    for name, linear in block.named_modules():
        if name in schemes:
            linear.weight = nn.Parameter(written[f"{name}.weight"].detach().clone())
    expected: torch.Tensor = 0.5 * (call(block, hidden[index]) - targets[index]).square().mean()
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected.detach())
    flat = torch.cat([block.get_submodule(name).weight.grad.flatten() for name in schemes])
    torch.testing.assert_close(tuned.flats[0].gradient, 2 * flat, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", PARTS)
def test_another_blocks_biases_reach_the_joined_product(parts: Parts) -> None:
    config = Qwen2Config(**SIZES, attn_implementation="sdpa")
    one, other = (fuse(Qwen2DecoderLayer(config, 0).to(DEVICE).float(), parts) for _ in range(2))
    for bias in (m.bias for m in other.modules() if isinstance(m, nn.Linear) and m.bias is not None):
        nn.init.uniform_(bias, 1, 2)
    schemes = {n: SCHEME for n, m in one.named_modules() if isinstance(m, nn.Linear)}
    task = replace(toy_task({}), block=one, schemes=schemes, device=torch.device(DEVICE))
    tuned = TunedBlock.of(task, rounded_weights(task, search=False))
    tuned.adopt(replace(task, block=other))
    assert isinstance(tuned.module, FusedBlock)
    joined = tuned.module.self_attn.joined
    assert isinstance(joined, GradientLinear)
    parameters = dict(other.named_parameters())
    wanted = torch.cat([parameters[f"self_attn.{n}_proj.bias"] for n in "qkv"])
    assert joined.bias is not None
    assert torch.equal(joined.bias, wanted)


def test_the_square_error_is_the_formula() -> None:
    torch.manual_seed(1)
    targets = torch.randn(6, 5, 9, device=DEVICE)
    parts = list(torch.randn(2, 3, 5, 9, device=DEVICE))
    index = torch.tensor([4, 0, 4], device=DEVICE)
    for given in (parts, parts[:1]):
        error = torch.stack(given).sum(0) - targets[index]
        loss, gradient = block_kernels.square_error(given, targets, index, 0.25, 3.0)
        torch.testing.assert_close(loss, 0.25 * error.square().mean())
        torch.testing.assert_close(gradient, 3 * 0.5 * error / error.numel())


def test_rows_are_taken_whole() -> None:
    source = torch.randn(7, 3, 1000, device=DEVICE)
    index = torch.tensor([6, 0, 3, 3], device=DEVICE)
    assert torch.equal(block_kernels.take_rows(source, index), source[index])
