"""Formulas of other methods against autograd, and blocks that they make in the engine's tuning loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.methods import Scheme
from benchmarks.few_bits.published import BLOCKS, TAU, BlockAP, SoftCodes
from tests.engine.conftest import run_job
from workers.methods import sign_round
from workers.methods.rtn import quantize_weight
from workers.numerics.quantized import AffineWeight


def straight(value: Tensor, free: Tensor) -> Tensor:
    """A value whose gradient is that of another."""
    return free + (value - free).detach()


@pytest.mark.parametrize("symmetric", [True, False])
def test_block_aps_gradient_is_autograds(symmetric: bool) -> None:
    torch.manual_seed(0)
    trained = BlockAP({"x": torch.randn(6, 32)}, Scheme(bits=2, group_size=16, symmetric=symmetric), 16, torch.float32)
    trained.scale.mul_(0.7)  # so that some codes are clamped
    w, s, z = (t.clone().requires_grad_() for t in (trained.weight, trained.scale, trained.zero))
    scale, zero = s.unsqueeze(1), straight(z.round().clamp(0, 3), z).unsqueeze(1)
    free = w / scale
    codes = (straight(free.round(), free) + zero).clamp(0, 3)
    d = torch.randn(12, 16)
    (d * (codes - zero) * scale).sum().backward()
    out = torch.empty(12 * 16)
    trained.write(out)
    torch.testing.assert_close(out.view(12, 16), ((codes - zero) * scale).detach())
    found = trained.gradients(d)
    for mine, leaf in zip(found[: 2 if symmetric else 3], (w, s, z), strict=False):
        assert leaf.grad is not None
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-5)
    assert 0.01 < (found[0] == 0).float().mean() < 0.9
    assert (not found[2].any()) == symmetric


def test_gsqs_gradient_is_autograds_and_samples_become_hard() -> None:
    torch.manual_seed(1)
    scheme = Scheme(bits=2, group_size=16, symmetric=True)
    start = quantize_weight(torch.randn(6, 32), scheme, torch.float32)
    assert isinstance(start, AffineWeight)
    soft = SoftCodes({"x": start}, scheme, 16, torch.float32, steps=4, seed=0)
    # A tenth of its start is noise.
    assert (soft.logits.argmax(-1).view(6, 32) == start.codes).float().mean() > 0.85
    out, d = torch.empty(12 * 16), torch.randn(12, 16)
    state = torch.get_rng_state()
    soft.write(out)
    torch.set_rng_state(state)
    noise = -torch.empty_like(soft.logits).exponential_().log()
    a, s = soft.logits.clone().requires_grad_(), soft.scale.clone().requires_grad_()
    w_hat = s.unsqueeze(1) * (((100 * a + noise) / TAU[0]).softmax(-1) @ torch.tensor([-2.0, -1.0, 0.0, 1.0]))
    (d * w_hat).sum().backward()
    torch.testing.assert_close(out.view(12, 16), w_hat.detach())
    for mine, leaf in zip(soft.gradients(d), (a, s), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-3, atol=1e-5)
    before = (soft._odds.max(-1).values > 0.99).float().mean()
    for _ in range(4):
        soft.step(d.flatten(), torch.tensor(1.0), out)
    assert (soft._odds.max(-1).values > 0.99).float().mean() > max(0.9, float(before))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_by_others_lower_the_loss_of_their_start(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sign_round.SignRound, "quantize_block", BLOCKS[name])
    body: dict[str, Any] = {"method": "signround", "bits": 2, "symmetric": True, "group_size": 32, "batch_size": 4}
    text = {"num_samples": 16, "sequence_length": 64}
    report = run_job(tiny_model, tmp_path, calibration=text, steps=60, **body).report
    assert all((block.loss or 9) < (block.loss_initial or 0) for block in report.blocks)
