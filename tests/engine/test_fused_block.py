"""Hand-fused parts against transformers' own modules: the same outputs and gradients, module by module and whole."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

pytest.importorskip("triton")
from workers.engine.fused_block import fuse
from workers.numerics import block_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_hidden_layers": 1,
}
BLOCKS = [
    pytest.param(LlamaConfig, LlamaDecoderLayer, 4, id="llama"),
    pytest.param(MistralConfig, MistralDecoderLayer, 4, id="mistral"),
    pytest.param(Qwen2Config, Qwen2DecoderLayer, 4, id="qwen2"),
    pytest.param(Qwen3Config, Qwen3DecoderLayer, 6, id="qwen3"),
]


@pytest.mark.parametrize(("config_class", "block_class", "parts"), BLOCKS)
def test_a_fused_block_equals_the_models_own(config_class: Any, block_class: Any, parts: int) -> None:
    torch.manual_seed(0)
    config = config_class(**SIZES, attn_implementation="sdpa")
    block = block_class(config, 0).to(DEVICE).float()
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    fused = copy.deepcopy(block)
    assert fuse(fused) == parts
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
    class OtherMLP(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    block = nn.Sequential(OtherMLP(), nn.Linear(4, 4))
    assert fuse(block) == 0
    assert isinstance(block[0], OtherMLP)


def test_mean_square_and_its_gradient_are_the_formula() -> None:
    torch.manual_seed(1)
    targets = torch.randn(6, 5, 9, device=DEVICE)
    output = torch.randn(3, 5, 9, device=DEVICE, requires_grad=True)
    index = torch.tensor([4, 0, 4], device=DEVICE)
    loss = block_kernels.mean_square(output, targets, index)
    (3 * loss).backward()
    expected = (output.detach() - targets[index]).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
    wanted = 6 * (output.detach() - targets[index]) / output.numel()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, wanted)


def test_rows_are_taken_whole() -> None:
    source = torch.randn(7, 3, 1000, device=DEVICE)
    index = torch.tensor([6, 0, 3, 3], device=DEVICE)
    assert torch.equal(block_kernels.take_rows(source, index), source[index])
