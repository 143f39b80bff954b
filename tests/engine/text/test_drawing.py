"""Tokens drawn for many sequences at once: by the model's odds, and without noise the likeliest ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig, MistralForCausalLM

from workers.engine.text.drawing import continued, draws

END = 1


@pytest.fixture(scope="module")
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def starts(model: Any, count: int) -> Tensor:
    return torch.randint(2, model.config.vocab_size, (count, 3), generator=torch.Generator().manual_seed(0))


def test_without_noise_the_tokens_are_those_of_a_greedy_generation(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1.0))
    rows = starts(model, 6)
    settings = GenerationConfig(do_sample=False, min_new_tokens=21, max_new_tokens=21, eos_token_id=END, pad_token_id=0)
    expected = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
    assert torch.equal(continued(model, rows, 24, END), expected)


def test_tokens_are_drawn_with_their_probability(model: Any) -> None:
    """Counts of the first drawn token against softmax, by chi-squared over the likelier tokens."""
    rows = starts(model, 1).expand(20_000, -1)
    odds = model(rows[:1]).logits[0, -1].double()
    odds[END] = -torch.inf
    expected = odds.softmax(0) * len(rows)
    torch.manual_seed(0)
    found = torch.bincount(continued(model, rows, 4, END)[:, 3], minlength=len(odds)).double()
    assert found[END] == 0
    likely = expected > 20
    assert likely.sum() > 5
    squares = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert abs(float(squares - likely.sum())) < 5 * float(2 * likely.sum()) ** 0.5


def test_numbers_that_are_not_finite_are_refused(model: Any) -> None:
    head = model.lm_head.weight
    before = head.detach().clone()
    head[5] = torch.nan
    with pytest.raises(FloatingPointError):
        continued(model, starts(model, 2), 6, END)
    head.copy_(before)


def test_a_model_that_looks_back_within_a_window_is_left_to_transformers(model: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    windowed = MistralForCausalLM(MistralConfig(vocab_size=32, num_hidden_layers=1, sliding_window=8, **sizes))
    assert draws(model)
    assert not draws(windowed)


@pytest.mark.gpu
def test_a_captured_step_draws_by_the_models_odds(model: Any) -> None:
    """On a GPU: the mean surprise of what was drawn is the mean entropy, at every place."""
    on_device = model.to("cuda")
    torch.manual_seed(0)
    drawn = continued(on_device, starts(model, 4096).cuda(), 12, None)
    log = on_device(drawn).logits[:, 2:-1].double().log_softmax(-1)
    entropy = -(log.exp() * log).sum(-1)
    surprise = -log.gather(-1, drawn[:, 3:, None])[..., 0]
    error = (surprise - entropy).std(0) / len(drawn) ** 0.5
    model.to("cpu")
    assert bool(((surprise - entropy).mean(0).abs() < 4.5 * error).all())
    assert len({tuple(row) for row in drawn.tolist()}) > 4000
