"""Perplexity, KL divergence and agreement against their definitions on the whole model."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitwright.errors import NumericalFailure
from tests.engine.model.random_models import VOCABULARY, save_random_model
from workers.engine import memory
from workers.engine.evaluate import PART, Beside, largest, measure
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.text.sequences import Sequences

CPU = torch.device("cpu")


def last_hidden(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    with torch.no_grad():
        model(ids)
    return seen[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("at_once", [VOCABULARY, VOCABULARY * 7, 1 << 24])
def test_measures_are_those_of_their_definitions(
    architecture: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.LOGITS_AT_ONCE, "cpu", at_once)
    whole = save_random_model(tmp_path, architecture).requires_grad_(False)
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    hidden = last_hidden(tmp_path, ids)
    noisy = hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    head = 1.1 * whole.get_output_embeddings().weight.detach()
    shares: list[float] = []
    model = StreamedModel.open(Checkpoint.open(tmp_path), CPU)
    found = measure(model, hidden, noisy, Sequences(ids, "x"), quantized_head=head, tick=shares.append)

    def logits(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        made = whole.model.norm(states) @ weight.T
        cap = getattr(whole.config, "final_logit_softcapping", None)
        capped: torch.Tensor = made if cap is None else cap * torch.tanh(made / cap)
        return capped.double()[:, :-1]

    p = logits(hidden, whole.get_output_embeddings().weight.detach()).log_softmax(-1)
    q = logits(noisy, head).log_softmax(-1)
    labels = ids[:, 1:].unsqueeze(-1)
    assert found.perplexity_original == pytest.approx(math.exp(-p.gather(-1, labels).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-q.gather(-1, labels).mean()), rel=1e-5)
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found.top1_agreement < 1
    assert shares == [pytest.approx((i + 1) / 3) for i in range(3)]
    assert {p.device.type for p in model.model.parameters()} == {"meta"}


def test_half_precision_is_measured_in_fp32(tmp_path: Path) -> None:
    """Against fp64 from the same bf16 logits: in bf16 the third digit would be wrong."""
    whole = save_random_model(tmp_path, "llama", dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    hidden = last_hidden(tmp_path, ids)
    assert hidden.dtype == torch.bfloat16
    noisy = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    model = StreamedModel.open(Checkpoint.open(tmp_path), CPU)
    found = measure(model, hidden, noisy, Sequences(ids, "x"), quantized_head=None, tick=lambda _: None)
    head = whole.get_output_embeddings().weight
    p, q = ((whole.model.norm(each) @ head.T).double()[:, :-1].log_softmax(-1) for each in (hidden, noisy))
    labels = ids[:, 1:].unsqueeze(-1)
    assert found.perplexity_original == pytest.approx(math.exp(-p.gather(-1, labels).mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(-q.gather(-1, labels).mean()), rel=1e-4)
    assert found.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_the_same_stream_twice_is_no_change(tmp_path: Path) -> None:
    save_random_model(tmp_path, "qwen3")
    ids = torch.arange(32).view(2, 16)
    hidden = last_hidden(tmp_path, ids)
    model = StreamedModel.open(Checkpoint.open(tmp_path), CPU)
    found = measure(model, hidden, hidden, Sequences(ids, "x"), quantized_head=None, tick=lambda _: None)
    assert found.perplexity == found.perplexity_original
    assert found.kl_divergence == 0
    assert found.top1_agreement == 1


def test_an_output_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    ids = torch.arange(16).view(1, 16)
    hidden = last_hidden(tmp_path, ids)
    model = StreamedModel.open(Checkpoint.open(tmp_path), CPU)
    with pytest.raises(NumericalFailure, match="after quantization"):
        measure(model, hidden, hidden * torch.nan, Sequences(ids, "x"), quantized_head=None, tick=lambda _: None)
    with pytest.raises(NumericalFailure, match="the original model's own outputs are not finite"):
        measure(model, hidden * torch.nan, hidden, Sequences(ids, "x"), quantized_head=None, tick=lambda _: None)


def test_what_is_measured_beside_has_the_quality_that_it_has_alone(tmp_path: Path) -> None:
    whole = save_random_model(tmp_path, "llama").requires_grad_(False)
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    hidden = last_hidden(tmp_path, ids)
    near, far = (hidden + size * torch.randn_like(hidden) for size in (0.1, 0.4))
    head = 1.1 * whole.get_output_embeddings().weight.detach()
    model = StreamedModel.open(Checkpoint.open(tmp_path), CPU)

    def alone(states: torch.Tensor, head: torch.Tensor | None, beside: Beside | None = None) -> object:
        texts = (model, hidden, states, Sequences(ids, "x"))
        return measure(*texts, quantized_head=head, tick=lambda _: None, beside=beside)

    beside = Beside(far, head, [])
    assert alone(near, None, beside) == alone(near, None)
    assert beside.found == [alone(far, head)]


@pytest.mark.parametrize("width", [PART, 7 * PART, 7 * PART + 1])
def test_the_largest_is_the_first_among_equals(width: int) -> None:
    """Logits of 16 bits are often equal."""
    rows = torch.randint(3, (200, width), generator=torch.Generator().manual_seed(0)).float()
    rows[0] = -torch.inf
    assert torch.equal(largest(rows), torch.tensor([row.index(max(row)) for row in rows.tolist()]))
