"""Calibration sequences that the model writes itself, for want of text of the right kind (LLM-QAT, arXiv 2305.17888).

A sequence begins as the tokenizer begins a text, then with one token drawn evenly from the vocabulary, so that
sequences differ; every further token is drawn from the model's own distribution at temperature 1, but for the end of
the text, which is never drawn. The whole model is in memory meanwhile. Left out of the paper: the three to five most
likely tokens after the first one, which would make sequences alike.

What was drawn is kept in the workspace: a resumed attempt and every rank read the same sequences.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.domain.request.job_request import Calibration
from bitwright.errors import InvalidDataset
from workers.disk.durable import replace_file
from workers.engine.device.process_group import PATIENCE
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.meta_model import configuration, model_class, model_dtype
from workers.engine.model.overflow import original_overflows
from workers.engine.text.sequences import Sequences, writes_start

MOST_AT_ONCE = 128
CACHE_SHARE = 0.25
"""Of the free memory, for keys and values."""
HOST_CACHE_BYTES = 2 << 30
LOOK_AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class Generation:
    """Model, tokenizer and device that draw, and the file that keeps the sequences."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    kept: Path
    leads: bool
    tick: Callable[[int], None]
    """Told how many sequences are drawn."""


def generated_sequences(config: Calibration, seed: int, by: Generation) -> Sequences:
    """`num_samples` sequences of `sequence_length` tokens; of several ranks the first draws them.

    Raises:
        InvalidDataset: the whole model does not fit into the device's free memory.
        TimeoutError: another rank, which was to draw them, has not.
    """
    shape = (config.num_samples, config.sequence_length)
    if by.leads and not by.kept.exists():
        replace_file(by.kept, save({"ids": _draw(config, seed, by)}))
    until = time.monotonic() + PATIENCE.total_seconds()
    while not by.kept.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no rank has written {by.kept.name}")
        time.sleep(LOOK_AGAIN_SECONDS)
    ids = load(by.kept.read_bytes())["ids"]
    if tuple(ids.shape) != shape:
        raise ValueError(f"{by.kept.name} holds {tuple(ids.shape)} tokens, not {shape}")
    return Sequences(ids, "generated")


def _draw(config: Calibration, seed: int, by: Generation) -> Tensor:
    """ids, int64 (num_samples, sequence_length), on the host."""
    model = _resident(by)
    start = _starts(config.num_samples, seed, by)
    at_once = _at_once(model, config.sequence_length, by.device)
    drawn: list[Tensor] = []
    with _seeded(seed, by.device), torch.inference_mode():
        if not model(start[:1].to(by.device)).logits.isfinite().all():
            raise original_overflows(model.dtype)
        for rows in torch.split(start.to(by.device), at_once):
            drawn.append(_continue(model, rows, config.sequence_length, by.tokenizer).cpu())
            by.tick(sum(map(len, drawn)))
    del model
    if by.device.type == "cuda":
        torch.cuda.empty_cache()  # what is free decides where activations live
    return torch.cat(drawn)


def _resident(by: Generation) -> PreTrainedModel:
    needed = by.checkpoint.size
    free = torch.cuda.mem_get_info(by.device)[0] if by.device.type == "cuda" else None
    if free is not None and needed > (1 - CACHE_SHARE) * free:
        raise InvalidDataset(
            f"to generate text the model must fit whole: it takes {needed >> 20} MiB, {free >> 20} MiB are free",
            field="calibration.dataset",
            value="generated",
            hint='calibrate on a text of yours or on "builtin", which need one block at a time',
        )
    return cast(PreTrainedModel, _loaded(by.checkpoint).to(by.device).eval())


def _loaded(checkpoint: Checkpoint) -> Any:
    """The model with its weights on the host, those of a quantized source as the numbers that they mean."""
    config = configuration(checkpoint)
    of_class: Any = model_class(config)
    if checkpoint.presented is None:
        return of_class.from_pretrained(
            checkpoint.folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return of_class.from_pretrained(None, config=config, state_dict=weights, dtype=model_dtype(config, checkpoint))


def _starts(count: int, seed: int, by: Generation) -> Tensor:
    """The tokens that sequences begin with, int64 (count, 1 or 2)."""
    generator = torch.Generator().manual_seed(seed)
    special = set(by.tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(len(by.tokenizer)) if i not in special])
    first = usual[torch.randint(len(usual), (count, 1), generator=generator)]
    if not writes_start(by.tokenizer):
        return first
    return torch.cat([torch.full_like(first, int(by.tokenizer.bos_token_id)), first], dim=1)


def _at_once(model: PreTrainedModel, length: int, device: torch.device) -> int:
    """Sequences whose keys and values fit."""
    config = model.config.get_text_config()
    # A layer without heads keeps a state that does not grow; as much as attention's is the most that it can be.
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    per_sequence = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
    room = CACHE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else HOST_CACHE_BYTES
    return max(1, min(MOST_AT_ONCE, int(room // per_sequence)))


def _continue(model: PreTrainedModel, rows: Tensor, length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """rows, continued to `length` tokens each."""
    end = tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=length - rows.shape[1],  # so the end of the text is never drawn
        max_new_tokens=length - rows.shape[1],
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        use_cache=True,
    )
    generate: Any = model.generate
    try:
        tokens: Tensor = generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
    except RuntimeError as error:  # torch's own words for a distribution that is none
        if "probability tensor contains" in str(error):
            raise original_overflows(model.dtype) from error
        raise
    return tokens


@contextmanager
def _seeded(seed: int, device: torch.device) -> Any:
    """torch's own generators, which `generate` draws from, seeded; afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
