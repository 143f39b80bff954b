"""Block by block is the whole model, for every type; and the faults that this comparison must see."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.architectures.configurations import LENGTH, TYPES, WINDOW, save_random
from tests.engine.architectures.proofs import CPU, difference, some_ids, streamed_logits
from workers.engine.model.block_calls import BlockCall
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("gemma2", "granite", "gpt2", "bloom", "falcon_h1", "qwen3_5", "deepseek_v3", "gpt_oss", "llava")
"""One of each kind: windows and caps, multipliers, learned positions, alibi, recurrence, wrappers and mixtures."""
TOLERANCE = 1e-4


def marked(names: Any) -> list[Any]:
    """The types with those that take the default run too long marked slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", marked(TYPES))
def test_block_by_block_gives_the_logits_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    assert LENGTH > WINDOW
    assert difference(tmp_path, save_random(tmp_path, model_type)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["gemma2", "falcon_h1"])
def test_linears_and_groups_are_those_that_the_block_calls(model_type: str, tmp_path: Path) -> None:
    save_random(tmp_path, model_type)
    model = StreamedModel.unproved(Checkpoint.open(tmp_path), CPU)
    groups = {frozenset(name.rpartition(".")[2] for name in group) for group in model.input_groups()}
    assert {"q_proj", "k_proj", "v_proj"} in groups
    assert {"gate_proj", "up_proj"} in groups
    assert not any("conv" in name or "dt_proj" in name for name in model.linears())


def test_one_layers_wrong_mask_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save_random(tmp_path, "gemma2")
    capture = StreamedModel.capture_calls

    def wrong(model: StreamedModel, length: int) -> tuple[BlockCall, ...]:
        calls = list(capture(model, length))
        masked = [call.keywords["attention_mask"] for call in calls]
        assert masked[0] is not masked[1]
        calls[2] = BlockCall(calls[2].arguments, calls[2].keywords | {"attention_mask": masked[1]})
        return tuple(calls)

    monkeypatch.setattr(StreamedModel, "capture_calls", wrong)
    assert difference(tmp_path, whole) > 100 * TOLERANCE


@pytest.mark.parametrize("fault", ["lost", "another dtype"])
def test_a_routers_bias_that_is_lost_or_rounded_is_seen(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_random(tmp_path, "deepseek_v3")
    fill = StreamedModel._fill_persistent_buffers
    names: list[str] = []

    def spoilt(model: StreamedModel) -> None:
        fill(model)
        for name, buffer in model.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                names.append(name)
                assert buffer.dtype == torch.float32
                # Eight bits of mantissa and a large common part: what bf16 leaves of such a bias.
                buffer.copy_(torch.zeros_like(buffer) if fault == "lost" else (buffer + 64).to(torch.bfloat16) - 64)

    assert difference(tmp_path, whole) < TOLERANCE
    monkeypatch.setattr(StreamedModel, "_fill_persistent_buffers", spoilt)
    assert difference(tmp_path, whole) > 100 * TOLERANCE
    assert len(names) == 2


def test_a_routers_bias_stays_fp32_in_a_bf16_model(tmp_path: Path) -> None:
    whole = save_random(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    model = StreamedModel.unproved(Checkpoint.open(tmp_path), CPU)
    expected = {n: b for n, b in type(whole).from_pretrained(tmp_path).named_buffers() if "correction_bias" in n}
    assert expected
    for name, buffer in expected.items():
        found = model.model.get_buffer(name)
        assert found.dtype == buffer.dtype == torch.float32
        assert torch.equal(found, buffer)


def test_a_batch_of_any_size_gets_arguments_of_its_size(tmp_path: Path) -> None:
    """Bloom's alibi has a row for each head of each sequence."""
    whole = save_random(tmp_path, "bloom")
    model = StreamedModel.unproved(Checkpoint.open(tmp_path), CPU)
    ids = some_ids(5)
    with torch.no_grad():
        expected: Tensor = whole(input_ids=ids).logits
    for micro_batch in (1, 2, 5):
        torch.testing.assert_close(streamed_logits(model, ids, micro_batch), expected, rtol=1e-4, atol=1e-4)
