"""Fused parts of blocks of any family: taken where they give transformers' own numbers, and nowhere else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from workers.engine.model.fused_blocks import FusedAttention, FusedMLP, FusedRMSNorm, Parts
from workers.engine.model.fused_parts import fuse_parts, warm_ups, without_bands
from workers.numerics.backends import block_kernels
from workers.numerics.causal_attention import Band

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW, LENGTH, WIDTH = 8, 40, 64
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONCE, TWICE = "norm, rounded once", "norm, rounded twice"
FUSED: dict[str, dict[str, object]] = {
    "gemma": {"input_layernorm": (1.0, ONCE), "mlp": "gelu", "self_attn": "attention"},
    "gemma2": {"pre_feedforward_layernorm": (1.0, ONCE), "mlp": "gelu", "self_attn": None},
    "gemma3_text": {"self_attn.q_norm": (1.0, ONCE), "mlp": "gelu", "self_attn": "attention"},
    "granite": {"input_layernorm": (0.0, TWICE), "mlp": "silu", "self_attn": "attention"},
    "olmo2": {"post_attention_layernorm": (0.0, ONCE), "mlp": "silu", "self_attn": None},
    "smollm3": {"input_layernorm": (0.0, TWICE), "mlp": "silu", "self_attn": "attention"},
    "cohere": {"input_layernorm": None, "mlp": "silu", "self_attn": None},
    "glm": {"input_layernorm": (0.0, TWICE), "mlp": None, "self_attn": None},
    "qwen3_moe": {"input_layernorm": (0.0, TWICE), "mlp": None, "self_attn": "attention"},
}
"""What is fused by family. gemma2 caps its scores, olmo2 norms whole queries, cohere and glm turn other pairs of
features."""


def model_of(family: str, **shape: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | shape))).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, 0, 0.6 / weight.shape[-1] ** 0.5)
        else:
            nn.init.uniform_(weight, 0.5, 1.5)
    model.requires_grad_(False)
    return model


def keywords_of(model: Any) -> Callable[[int, int], dict[str, Any]]:
    def keywords(index: int, length: int) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        hook = model.model.layers[index].register_forward_pre_hook(
            lambda _, __, given: calls.append(given), with_kwargs=True
        )
        model(torch.ones(1, length, dtype=torch.int64), use_cache=False)
        hook.remove()
        return calls[0]

    return keywords


def described(module: nn.Module) -> object:
    if isinstance(module, FusedRMSNorm):
        return module.offset, TWICE if module.rounds_twice else ONCE
    if isinstance(module, FusedMLP):
        return module.activation
    return "attention" if isinstance(module, FusedAttention) else None


@pytest.mark.parametrize("family", FUSED)
def test_a_family_keeps_its_logits_and_gradients(family: str) -> None:
    model, ids = model_of(family), torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(model)
    fuse_parts(fused.model.layers, Parts.operators(), keywords_of(fused))
    assert {name: described(fused.model.layers[0].get_submodule(name)) for name in FUSED[family]} == FUSED[family]
    assert dict(fused.named_parameters()).keys() == dict(model.named_parameters()).keys()
    results = []
    for each in (model, fused):
        hidden = each.get_input_embeddings()(ids).clone().requires_grad_()
        logits = each(inputs_embeds=hidden, use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append((logits.detach(), hidden.grad))
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert found is not None
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_each_shape_of_block_is_asked_once() -> None:
    model = model_of("granite", num_hidden_layers=5)
    given, asked = keywords_of(model), list[int]()

    def keywords(index: int, length: int) -> dict[str, Any]:
        asked.append(index)
        return given(index, length)

    fuse_parts(model.model.layers, Parts.operators(), keywords)
    assert asked == [0]
    assert all(isinstance(block.mlp, FusedMLP) for block in model.model.layers)


def test_an_activation_that_is_almost_the_same_is_another() -> None:
    model = model_of("granite", hidden_act="gelu")  # the exact form; tanh's is within 5e-4 of it
    fuse_parts(model.model.layers, Parts.operators(), keywords_of(model))
    assert not isinstance(model.model.layers[0].mlp, FusedMLP)


class Clipped(nn.Module):
    """An MLP that clips what a plain one does not."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))
        return down


def test_a_clip_far_out_shows() -> None:
    model = model_of("granite")
    for block in model.model.layers:
        block.mlp = Clipped(block.mlp)
    fuse_parts(model.model.layers, Parts.operators(), keywords_of(model))
    assert all(isinstance(block.mlp, Clipped) for block in model.model.layers)


@pytest.mark.parametrize(
    "parts", [pytest.param(Parts.kernels(), id="kernels"), pytest.param(Parts.operators(), id="operators")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_gelu_times_up_is_the_formula(parts: Parts, packed: bool) -> None:
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(2, 5, 24, device=DEVICE) for _ in range(2))
    results = []
    for dtype, multiply in ((torch.float64, None), (torch.float32, parts.gelu_mul)):
        g, u = (x.to(dtype).requires_grad_() for x in (gate, up))
        if multiply is None:
            y = g / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u
        else:
            y = multiply(torch.cat([g, u], -1)) if packed else multiply(g, u)
        (y * torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=dtype).view_as(y)).sum().backward()
        results.append([y.detach(), g.grad, u.grad])
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "parts", [pytest.param(Parts.kernels(), id="kernels"), pytest.param(Parts.operators(), id="operators")]
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rounds_twice", [False, True])
def test_a_norm_rounds_where_it_says(parts: Parts, offset: float, rounds_twice: bool) -> None:
    torch.manual_seed(0)  # in fp16: the kernels' interpreter cuts bf16 off instead of rounding
    x, weight = torch.randn(3, 7, 48, device=DEVICE).half(), torch.rand(48, device=DEVICE).half()
    found = parts.rms_norm(x, weight, 1e-6, offset=offset, rounds_twice=rounds_twice)
    normal = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normal = normal.half().double() if rounds_twice else normal
    expected = (normal * (weight.double() + offset)).half()
    assert (found != expected).float().mean() < 0.01
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    "parts", [pytest.param(Parts.kernels(), id="kernels"), pytest.param(Parts.operators(), id="operators")]
)
def test_a_norms_gradient_is_autograds(parts: Parts, offset: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 48, device=DEVICE), torch.rand(48, device=DEVICE)
    results = []
    for norm in (
        lambda x: (weight + offset) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(),
        lambda x: parts.rms_norm(x, weight, 1e-6, offset=offset, rounds_twice=False),
    ):
        given = x.clone().requires_grad_()
        (norm(given) * torch.linspace(-1, 1, x.numel(), device=DEVICE).view_as(x)).sum().backward()
        results.append(given.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_band_is_known_by_its_mask() -> None:
    place = torch.arange(6)
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 3)
    assert Band.of(seen[None, None]) == Band(3)
    assert torch.equal(Band(3).mask(6, torch.device("cpu")), seen)
    assert Band.of(seen.tril().triu(-5)[None, None].clone().fill_(True).tril()) == Band(6)
    hole = seen.clone()
    hole[4, 3] = False
    assert Band.of(hole[None, None]) is None
    assert Band.of(seen.T[None, None]) is None
    assert Band.of(torch.zeros(1, 1, 6, 6)) is None
    assert Band.of(seen[None, None].expand(2, 1, 6, 6)) is None


def test_a_band_takes_the_place_of_a_mask_only_where_attention_takes_it() -> None:
    model = model_of("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
    given = keywords_of(model)
    call = {"attention_mask": Band(WINDOW).mask(LENGTH, torch.device("cpu"))[None, None]}
    block = model.model.layers[0]
    assert without_bands(block, call, {}) is call
    fuse_parts(nn.ModuleList([block]), Parts.operators(), given)
    assert without_bands(block, call, {}) is call
    model = model_of("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
    block = model.model.layers[0]
    fuse_parts(nn.ModuleList([block]), Parts.kernels(), keywords_of(model))
    assert without_bands(block, call, {}) == {"attention_mask": Band(WINDOW)}
    assert without_bands(block, {"attention_mask": None}, {}) == {"attention_mask": None}


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_warm_ups_launch_every_kernel_of_the_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    for name in ("_rms_norm", "_rms_norm_backward", "_activation_mul", "_activation_mul_backward", "_turn"):
        kernel = getattr(block_kernels, name)

        class Noted:
            def __getitem__(self, grid: object, kernel: Any = kernel, name: str = name) -> Any:
                launched.add(name)
                return kernel[grid]

        monkeypatch.setattr(block_kernels, name, Noted())
    model = model_of(family, num_hidden_layers=3)
    fuse_parts(model.model.layers, Parts.kernels(), keywords_of(model))
    calls = warm_ups(model.model.layers, torch.float32, torch.device(DEVICE))
    assert len(calls) == {"gemma3_text": 4, "granite": 3}[family]  # two widths of norms; an MLP; attention
    for call in calls:
        call()
    assert launched == {"_rms_norm", "_rms_norm_backward", "_activation_mul", "_activation_mul_backward", "_turn"}
