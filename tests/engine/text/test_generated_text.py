"""Text that the model writes itself: drawn from its own distribution, the same again, kept for whoever comes next."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import Calibration
from app.domain.request.sources import GeneratedText
from tests.engine.conftest import run_job
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.text.generated import Generation, generated_sequences
from workers.engine.text.sequences import load_tokenizer

PART = Calibration(dataset=GeneratedText(), num_samples=48, sequence_length=40)


def generation(model: Path, kept: Path) -> Generation:
    return Generation(
        checkpoint=Checkpoint.open(model),
        tokenizer=load_tokenizer(model),
        device=torch.device("cpu"),
        kept=kept,
        leads=True,
        tick=lambda _: None,
    )


def surprise_and_entropy(model: Path, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """-log p of every drawn token and the entropy that it was drawn from, in nats, without the end of the text."""
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = causal(ids).logits[:, :-1].double()
    logits[..., end] = -torch.inf
    log = logits.log_softmax(-1)
    entropy = -(log.exp() * log.masked_fill(log.isinf(), 0)).sum(-1)
    drawn = -log.gather(-1, ids[:, 1:, None])[..., 0]
    return drawn[:, 1:], entropy[:, 1:]  # the first token after the start is drawn evenly


def test_tokens_are_drawn_from_the_models_own_distribution(small_model: Path, tmp_path: Path) -> None:
    """The mean surprise of what was drawn is the mean entropy; picking the likeliest token would be far below it."""
    by = generation(small_model, tmp_path / "generated.safetensors")
    ids = generated_sequences(PART, 0, by).ids
    assert ids.shape == (48, 40)
    end = by.tokenizer.eos_token_id
    assert isinstance(end, int)
    assert not (ids[:, 2:] == end).any()
    drawn, entropy = surprise_and_entropy(small_model, ids, end)
    error = (drawn - entropy).std() / drawn.numel() ** 0.5
    assert float((drawn.mean() - entropy.mean()).abs()) < 4 * float(error)


def test_a_seed_gives_its_windows_again_and_another_one_others(small_model: Path, tmp_path: Path) -> None:
    found = [
        generated_sequences(PART, seed, generation(small_model, tmp_path / f"{number}.safetensors")).sha256
        for number, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]


def test_windows_are_kept_and_read_by_other_ranks(small_model: Path, tmp_path: Path) -> None:
    by = generation(small_model, tmp_path / "generated.safetensors")
    first = generated_sequences(PART, 0, by)
    assert torch.equal(generated_sequences(PART, 99, by).ids, first.ids)
    assert torch.equal(generated_sequences(PART, 0, replace(by, leads=False)).ids, first.ids)


def test_a_job_calibrates_on_it(small_model: Path, tmp_path: Path) -> None:
    asked = {"dataset": "generated", "num_samples": 8, "sequence_length": 32}
    report = run_job(small_model, tmp_path, method="signround", bits=3, steps=8, calibration=asked).report
    assert report.calibration is not None
    assert (report.calibration.source, report.calibration.tokens) == ("generated", 256)
    assert report.quality is not None


def test_only_calibration_may_be_generated(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"evaluation\.dataset"):
        run_job(small_model, tmp_path, evaluation={"dataset": "generated"})
