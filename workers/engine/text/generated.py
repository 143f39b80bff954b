"""Calibration sequences that the model writes itself, for want of text of the right kind (LLM-QAT, arXiv 2305.17888).

A sequence begins as the tokenizer begins a text, then with one token drawn evenly from the vocabulary, so that
sequences differ; every further token is drawn from the model's own distribution at temperature 1, but for the end of
the text, which is never drawn. The whole model is in memory meanwhile. Left out of the paper: the three to five most
likely tokens after the first one, which would make sequences alike.

Beside a text, the model writes pieces of 512 tokens, which begin with such a token; and where there is little text, as
many that begin with 16 to 64 tokens of a place of it. Shuffled, some make a sequence.

What was drawn is kept in the workspace: a resumed attempt and every rank read the same sequences.
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from workers.engine.text.drawing import continued, draws
from workers.engine.text.sequences import Sequences, writes_start

MOST_AT_ONCE, MOST_PIECES_AT_ONCE = 128, 2048
"""Sequences, and pieces, which are short."""
PIECE, PREFIXES = 512, (16, 32, 48, 64)
"""Tokens of a piece at the most, and of the text at its beginning."""
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
    tick: Callable[[int, int], None]
    """Told how many sequences are drawn, and of how many."""

    @property
    def fits(self) -> bool:
        """True if the whole model finds room."""
        return self.checkpoint.size <= (1 - CACHE_SHARE) * self.free

    @property
    def free(self) -> float:
        """Free bytes of a GPU; a host's memory is not asked for."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf


def generated_sequences(config: Calibration, seed: int, by: Generation) -> Sequences:
    """`num_samples` sequences of `sequence_length` tokens; of several ranks the first draws them.

    Raises:
        InvalidDataset: the whole model does not fit into the device's free memory.
        TimeoutError: another rank, which was to draw them, has not.
    """
    ids = _kept(by, lambda: _draw(config, seed, by))
    shape = (config.num_samples, config.sequence_length)
    if tuple(ids.shape) != shape:
        raise ValueError(f"{by.kept.name} holds {tuple(ids.shape)} tokens, not {shape}")
    return Sequences(ids, "generated")


def with_written(config: Calibration, text: Sequences, seed: int, by: Generation) -> Sequences:
    """A text with further sequences that the model writes itself, up to `written_samples`.

    Half of them are free. The others begin with places of the text, and are as many as the text has fewer further ones
    than `further_samples`; all, if that is not asked for. None where the whole model does not fit into the device's
    free memory.

    Raises:
        TimeoutError: another rank, which was to draw them, has not.
    """
    own = 0 if text.further is None else len(text.further)
    placed = config.written_samples // 2
    free = config.written_samples - placed
    if config.further_samples:
        placed = min(placed, max(0, config.further_samples - own))
    count = free + placed
    if not count:
        return text
    shape = (count, config.sequence_length)
    ids = _kept(by, lambda: _draw_pieces(shape, placed, text.ids, seed, by) if by.fits else text.ids[:0])
    if tuple(ids.shape) not in (shape, (0, shape[1])):
        raise ValueError(f"{by.kept.name} holds {tuple(ids.shape)} tokens, not {shape}")
    further = ids if text.further is None else torch.cat([text.further, ids])
    return replace(text, further=further if len(further) else None, written=len(ids))


def _kept(by: Generation, draw: Callable[[], Tensor]) -> Tensor:
    """Tokens of the file that keeps them; the first of several ranks draws them, where they are not there."""
    if by.leads and not by.kept.exists():
        replace_file(by.kept, save({"ids": draw()}))
    until = time.monotonic() + PATIENCE.total_seconds()
    while not by.kept.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no rank has written {by.kept.name}")
        time.sleep(LOOK_AGAIN_SECONDS)
    return load(by.kept.read_bytes())["ids"]


def _draw(config: Calibration, seed: int, by: Generation) -> Tensor:
    """ids, int64 (num_samples, sequence_length), on the host."""
    starts = free_starts(config.num_samples, seed, by)
    return torch.cat(_continued([starts], config.sequence_length, seed, by, MOST_AT_ONCE))


def _draw_pieces(shape: tuple[int, int], placed: int, text: Tensor, seed: int, by: Generation) -> Tensor:
    """ids, int64 of that shape (sequences, length), on the host; text: sequences of the calibration.

    placed   how many sequences' pieces begin with places of the text
    """
    pieces = Pieces.of(shape, seed)
    after = placed * pieces.each
    return pieces.drawn([free_starts(pieces.count - after, seed, by), *pieces.placed(after, text, by)], by)


@dataclass(frozen=True)
class Pieces:
    """Short pieces that make sequences of a shape together.

    each     pieces a sequence
    length   tokens of a piece
    count    pieces in all
    """

    shape: tuple[int, int]
    seed: int
    each: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, int], seed: int) -> "Pieces":
        each = math.ceil(shape[1] / PIECE)
        return cls(shape, seed, each, math.ceil(shape[1] / each))

    @property
    def count(self) -> int:
        return self.shape[0] * self.each

    def placed(self, count: int, text: Tensor, by: Generation) -> list[Tensor]:
        """Beginnings of so many pieces, from places of a text (sequences, length); a quarter of each of PREFIXES."""
        generator, starts = torch.Generator().manual_seed(self.seed), []
        for number, prefix in enumerate(PREFIXES):
            some = count * (number + 1) // len(PREFIXES) - count * number // len(PREFIXES)
            width = min(prefix, self.length // 2, text.shape[1])
            rows = torch.randint(len(text), (some, 1), generator=generator)
            offsets = torch.randint(text.shape[1] - width + 1, (some, 1), generator=generator)
            starts.append(_after_start(text[rows, offsets + torch.arange(width)], by))
        return starts

    def drawn(self, starts: list[Tensor], by: Generation) -> Tensor:
        """Sequences of the shape: all pieces as the model goes on from their beginnings, shuffled."""
        given = [rows for rows in starts if len(rows)]
        drawn = torch.cat(_continued(given, self.length, self.seed, by, MOST_PIECES_AT_ONCE))
        shuffled = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(self.seed + 1))]
        return shuffled.view(self.shape[0], self.each * self.length)[:, : self.shape[1]].contiguous()


def _continued(starts: list[Tensor], length: int, seed: int, by: Generation, most: int) -> list[Tensor]:
    """Starts (sequences, any length) continued to `length` tokens, on the host."""
    model, total = _resident(by), sum(map(len, starts))
    at_once = min(most, _room(model, length, by.device))
    drawn: list[Tensor] = []
    with _seeded(seed, by.device), torch.inference_mode():
        if not model(starts[0][:1].to(by.device)).logits.isfinite().all():
            raise original_overflows(model.dtype)
        for rows in (rows for start in starts for rows in torch.split(start, at_once)):
            drawn.append(_continue(model, rows.to(by.device), length, by.tokenizer).cpu())
            by.tick(sum(map(len, drawn)), total)
    del model
    if by.device.type == "cuda":
        torch.cuda.empty_cache()  # what is free decides where activations live
    return drawn


def _resident(by: Generation) -> PreTrainedModel:
    if not by.fits:
        needed, free = by.checkpoint.size >> 20, int(by.free) >> 20
        raise InvalidDataset(
            f"to generate text the model must fit whole: it takes {needed} MiB, {free} MiB are free",
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


def free_starts(count: int, seed: int, by: Generation) -> Tensor:
    """The tokens that sequences begin with, int64 (count, 1 or 2)."""
    generator = torch.Generator().manual_seed(seed)
    special = set(by.tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(len(by.tokenizer)) if i not in special])
    first = usual[torch.randint(len(usual), (count, 1), generator=generator)]
    return _after_start(first, by)


def _after_start(rows: Tensor, by: Generation) -> Tensor:
    """Rows behind the token that the tokenizer begins a text with, if there is one."""
    if not writes_start(by.tokenizer):
        return rows
    return torch.cat([torch.full_like(rows[:, :1], int(by.tokenizer.bos_token_id)), rows], dim=1)


def _room(model: PreTrainedModel, length: int, device: torch.device) -> int:
    """Sequences whose keys and values fit."""
    config = model.config.get_text_config()
    # A layer without heads keeps a state that does not grow; as much as attention's is the most that it can be.
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    per_sequence = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
    room = CACHE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else HOST_CACHE_BYTES
    return max(1, int(room // per_sequence))


def _continue(model: PreTrainedModel, rows: Tensor, length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """rows, continued to `length` tokens each."""
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int)  # noqa: S101 - for the type checker
    if draws(model):
        state = _random_state(rows.device)
        try:
            return continued(model, rows, length, end)
        except FloatingPointError as error:
            raise original_overflows(model.dtype) from error
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what cannot be captured; `generate` draws as if nothing had been drawn
            if rows.device.type != "cuda":
                raise
            torch.cuda.set_rng_state(state, rows.device)
    return _generated(model, rows, length, end)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _generated(model: PreTrainedModel, rows: Tensor, length: int, end: int | None) -> Tensor:
    """The same by transformers, whose cache grows."""
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
