"""Text that the model writes itself: drawn from its own distribution, the same again, kept for whoever comes next."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain.request.job_request import Calibration
from app.domain.request.sources import GeneratedText
from tests.engine.conftest import run_job
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.text import generated
from workers.engine.text.generated import PREFIXES, Generation, generated_sequences, with_written
from workers.engine.text.sequences import Sequences, load_tokenizer

PART = Calibration(dataset=GeneratedText(), num_samples=48, sequence_length=40)


def generation(model: Path, kept: Path) -> Generation:
    return Generation(
        checkpoint=Checkpoint.open(model),
        tokenizer=load_tokenizer(model),
        device=torch.device("cpu"),
        kept=kept,
        leads=True,
        tick=lambda *_: None,
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


def text_beside(further: int) -> Sequences:
    """A text of rows of ever larger tokens, so that a place of it is known again."""
    ids = torch.arange(10, 10 + 5 * 40).view(5, 40)
    return Sequences(ids, "x", further=torch.full((further, 40), 7) if further else None)


def test_what_is_written_beside_a_text_begins_with_places_of_it_or_freely(small_model: Path, tmp_path: Path) -> None:
    by, text = generation(small_model, tmp_path / "written.safetensors"), text_beside(0)
    config = Calibration(written_samples=40, num_samples=5, sequence_length=40)
    found = with_written(config, text, 3, by)
    assert found.further is not None
    assert (found.written, tuple(found.further.shape)) == (40, (40, 40))
    assert torch.equal(found.ids, text.ids)
    inner = found.further[:, 1:] if (found.further[:, 0] == by.tokenizer.bos_token_id).all() else found.further
    runs = [(row[1:] == row[:-1] + 1).long().cumprod(0).sum().item() + 1 for row in inner]
    placed = [run for run in runs if run >= min(PREFIXES)]
    assert len(placed) == 20
    assert {min(prefix, 20) for prefix in PREFIXES} <= set(placed)
    assert len({tuple(row.tolist()) for row in found.further}) == 40
    read = with_written(config, text, 99, replace(by, leads=False))
    other = with_written(config, text, 3, replace(by, kept=tmp_path / "again.safetensors"))
    assert read.further_sha256 == other.further_sha256 == found.further_sha256


@pytest.mark.parametrize(
    ("own", "further", "written", "expected"),
    [(3, 8, 4, 4), (7, 8, 4, 3), (8, 8, 4, 2), (8, 8, 5, 3), (3, 0, 4, 4), (0, 0, 0, 0)],
)
def test_half_is_written_always_and_as_much_after_the_text_as_it_has_too_little(
    own: int, further: int, written: int, expected: int, small_model: Path, tmp_path: Path
) -> None:
    config = Calibration(written_samples=written, further_samples=further, num_samples=5, sequence_length=40)
    text = text_beside(own)
    found = with_written(config, text, 0, generation(small_model, tmp_path / "written.safetensors"))
    assert found.written == expected
    assert (0 if found.further is None else len(found.further)) == own + expected
    if own and expected:
        assert found.further is not None
        assert text.further is not None
        assert torch.equal(found.further[:own], text.further)


def test_a_model_without_room_writes_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generation, "free", 1000.0)
    config = Calibration(written_samples=4, num_samples=5, sequence_length=40)
    found = with_written(config, text_beside(0), 0, generation(small_model, tmp_path / "written.safetensors"))
    assert (found.written, found.further) == (0, None)


def test_a_job_is_tuned_end_to_end_on_what_the_model_writes_once(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"num_samples": 12, "sequence_length": 32, "written_samples": 9}
    asked: dict[str, Any] = {
        "method": "signround",
        "bits": 2,
        "group_size": 16,
        "steps": 4,
        "batch_size": 4,
        "scale_steps": 20,
    }
    report = run_job(small_model, tmp_path, calibration=text, evaluation=None, **asked).report
    assert report.scales is not None
    assert (report.scales.further, report.scales.written) == (9, 9)
    card = (tmp_path / "output" / "native" / "README.md").read_text()
    assert "codes changed, on 9 sequences that the model wrote besides" in card
    monkeypatch.setattr(generated, "_draw_pieces", None)
    again = run_job(small_model, tmp_path, calibration=text, evaluation=None, **asked).report
    assert (again.blocks_resumed, again.scales) == (len(report.blocks), report.scales)
    plain = run_job(small_model, tmp_path / "b", calibration=text, evaluation=None, **(asked | {"scale_steps": 0}))
    assert plain.report.scales is None
    assert not (tmp_path / "b" / "written.safetensors").exists()


def test_only_calibration_may_be_generated(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"evaluation\.dataset"):
        run_job(small_model, tmp_path, evaluation={"dataset": "generated"})
