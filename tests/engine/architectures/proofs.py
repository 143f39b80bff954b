"""Proofs that a type is done right: block by block is the whole model, and every checkpoint is what the report says."""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from bitwright.report import Report
from tests.engine.architectures.configurations import LENGTH, VOCABULARY
from tests.engine.conftest import run_job
from workers.engine import evaluate
from workers.engine.model.block_calls import run_block
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.meta_model import model_class
from workers.engine.model.streamed_model import StreamedModel
from workers.tiny_model import Recipe, train_tokenizer, training_text

CPU = torch.device("cpu")
ORDINARY = 300
"""Token ids from here on may stand for images."""
RECIPE = Recipe(vocabulary=ORDINARY, positions=128)


def some_ids(rows: int = 3) -> Tensor:
    """Token ids (rows, LENGTH), longer than every window."""
    return torch.randint(ORDINARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streamed_logits(model: StreamedModel, ids: Tensor, micro_batch: int = 2) -> Tensor:
    """Logits of the model one block at a time."""
    calls = model.capture_calls(ids.shape[1])
    with model.loaded(*model.layout.outer):
        hidden = model.embed(ids)
    for index, call in enumerate(calls):
        with model.loaded(model.layout.block(index)):
            run_block(call, model.blocks[index], hidden, hidden, micro_batch=micro_batch, device=CPU)
    with model.loaded(*model.after_blocks):
        return model.logits(hidden)


@torch.no_grad()
def difference(folder: Path, whole: PreTrainedModel) -> float:
    """Largest difference of streamed logits from those of the whole model, in units of their standard deviation."""
    ids = some_ids()
    expected: Tensor = whole(input_ids=ids).logits
    found = streamed_logits(StreamedModel.unproved(Checkpoint.open(folder), CPU), ids)
    return float((found - expected).abs().max() / expected.std())


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with as many tokens as `some_ids` has."""
    train_tokenizer(training_text(), RECIPE).save_pretrained(folder)


@contextmanager
def watched_texts() -> Iterator[list[Tensor]]:
    """Token ids of the evaluation text of jobs that run in the context."""
    seen: list[Tensor] = []
    measure = evaluate.measure

    def watch(model: Any, original: Tensor, quantized: Tensor, sequences: Any, **rest: Any) -> Any:
        seen.append(sequences.ids)
        return measure(model, original, quantized, sequences, **rest)

    with patch.object(evaluate, "measure", watch):
        yield seen


def proved_job(model: Path, workspace: Path, **request: Any) -> tuple[Report, Tensor]:
    """Runs a job; its report, and the token ids that it was evaluated on."""
    texts = {
        "calibration": {"num_samples": 8, "sequence_length": LENGTH},
        "evaluation": {"num_samples": 4, "sequence_length": LENGTH},
    }
    with watched_texts() as seen:
        result = run_job(model, workspace, **{"bits": 4, "group_size": 16, **texts, **request})
    return result.report, seen[0]


def reloaded(folder: Path) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A checkpoint as its own loader, or transformers, loads it; and what transformers misses or finds too much."""
    loader = folder / "load_bitwright.py"
    if loader.exists():
        spec = importlib.util.spec_from_file_location("load_bitwright", loader)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model, info = module.load(folder, output_loading_info=True)
    else:
        config = AutoConfig.from_pretrained(folder)
        model, info = model_class(config).from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean loss of next tokens."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    return math.exp(float(losses))


def deviation(folder: Path, report: Report, ids: Tensor) -> tuple[float, list[str]]:
    """How far a checkpoint's perplexity is from the report's, relative; and keys that transformers misses or leaves."""
    model, info = reloaded(folder)
    kinds = ("missing_keys", "unexpected_keys")
    wrong = [f"{kind} {sorted(map(str, info[kind]))[:2]}" for kind in kinds if info[kind]]
    assert report.quality is not None
    return abs(perplexity(model, ids) / report.quality.perplexity - 1), wrong


def touched(source: Path, result: Path) -> list[str]:
    """Stored tensors outside of the quantized linears that a merged checkpoint lost, changed, or has too much."""
    before, after = Checkpoint.open(source), Checkpoint.open(result)
    model = StreamedModel.unproved(before, CPU)
    linears = (f"{name}.weight" for name in model.linears())
    quantized = {stored for name in linears for stored in model.names.stored_names(name)}
    wrong = list(before.tensors.keys() ^ after.tensors.keys())
    for name in before.tensors.keys() & after.tensors.keys() - quantized:
        one, other = before.read(name), after.read(name)
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not same or not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            wrong.append(name)
    return sorted(wrong)


CONV1D = "transformers keeps the linears of this type as Conv1D, which compressed-tensors does not replace"
WEIGHTS = "transformers reads the weights of linears of this type itself, and packed ones have none"
FUSED = "experts of this type are fused in its files, and transformers does not put packed experts together"


def format_refusals(model: StreamedModel) -> dict[str, str]:
    """Formats that no stock loader would load for this type, and why."""
    if model.transposed:
        return {"compressed-tensors": CONV1D}
    if any(type(linear) is not torch.nn.Linear for linear in model.linears().values()):
        return {"compressed-tensors": WEIGHTS}
    if any(f"{name}.weight" not in model.sources for name in model.linears() if name != model.layout.head):
        return {"compressed-tensors": FUSED}
    return {}


assert VOCABULARY > ORDINARY
