"""Sequences that the end-to-end stage may be tuned on when there is no more text than the calibration's.

cut       windows of the text at its start, then at offsets between these: each window is another context
written   what the original model writes itself, at temperature 1, after 16 to 64 tokens of places of the text
          (as LLM-QAT has it, arXiv:2305.17888, which begins with a single token)
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from benchmarks.against_auto_round import beginning, read_rows, windows

SHORTEST, LONGEST = 16, 64
"""Tokens of the text before a written piece."""
SURE = 4
"""Tokens of a free piece after which others than the likeliest are drawn."""
PIECE = 512
"""Tokens of a piece; several make a sequence. The shorter, the nearer to the text."""
PIECES_AT_ONCE, ROWS_AT_ONCE = 2048, 512


def mixed(paths: list[str]) -> list[str]:
    """Rows of several files in turn, those of a longer file at the end."""
    rows = [read_rows(path) for path in paths]
    order = sorted((place / len(own), file, place) for file, own in enumerate(rows) for place in range(len(own)))
    return [rows[file][place] for _, file, place in order]


def sequences_of(tokenizer: PreTrainedTokenizerBase, rows: list[str], length: int, count: int) -> Tensor:
    """The first `count` windows (count, length) of rows, or as many as there are, each behind the beginning of a text.

    Rows are tokenized together, which takes as many threads as there are processors.
    """
    begin, tokens = beginning(tokenizer), []
    each = length - len(begin)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        found = tokenizer([row + "\n\n" for row in rows[first : first + ROWS_AT_ONCE]], add_special_tokens=False)
        tokens.extend(token for row in found.input_ids for token in row)
        if len(tokens) >= count * each:
            break
    ids = torch.tensor(tokens[: min(count, len(tokens) // each) * each]).view(-1, each)
    return torch.cat([begin.expand(len(ids), -1), ids], dim=1)


def cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> Tensor:
    """`count` windows (count, length), or as many as there are: by offset, each a share of the length farther on."""
    straight = windows(tokenizer, text, length)[:, 0]
    cuts = math.ceil(count / len(straight))
    begin = len(beginning(tokenizer))
    stream = straight[:, begin:].flatten()
    found = [straight]
    for number in range(1, cuts):
        rest = stream[number * length // cuts :]
        rows = rest[: len(rest) // (length - begin) * (length - begin)].view(-1, length - begin)
        found.append(torch.cat([straight[: len(rows), :begin], rows], dim=1))
    return torch.cat(found)[:count]


@torch.inference_mode()
def written(model: Any, prefixes: Tensor, given: Tensor, length: int, seed: int, sure: int = 0) -> Tensor:
    """Sequences (pieces, length) that a model goes on with at temperature 1.

    model      of transformers, on its device
    prefixes   (pieces, tokens): of each the first `given` are taken, at least one
    sure       the place before which the likeliest token is taken
    """
    device, generator, cache = model.device, torch.Generator(model.device).manual_seed(seed), DynamicCache()
    prefixes, given = prefixes.to(device), given.to(device)
    ids = token = prefixes[:, : int(given.min())]
    for place in range(ids.shape[1], length):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if place < sure:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        if place < prefixes.shape[1]:
            token = torch.where((place < given).unsqueeze(1), prefixes[:, place : place + 1], token)
        ids = torch.cat([ids, token], dim=1)
    return ids


def written_sequences(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int, seed: int
) -> Tensor:
    """`count` sequences (count, length), of pieces that begin at places of the text which are drawn without order."""
    piece, generator = min(PIECE, length), torch.Generator().manual_seed(seed)
    places = cut(tokenizer, text, piece, count * (length // piece))[:, :LONGEST]
    places = places[torch.randperm(len(places), generator=generator)]
    given = torch.randint(SHORTEST, LONGEST + 1, (len(places),), generator=generator).clamp(max=places.shape[1])
    return _sequences(model, places, given, piece, length, seed)


def free_sequences(model: Any, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Tensor:
    """`count` sequences (count, length), of pieces that begin with a token drawn from all but the special ones."""
    piece, generator, begin = min(PIECE, length), torch.Generator().manual_seed(seed), beginning(tokenizer)
    plain = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    pieces = count * (length // piece)
    first = plain[torch.randint(len(plain), (pieces, 1), generator=generator)]
    prefixes = torch.cat([begin.expand(pieces, -1), first], dim=1)
    given = torch.full((pieces,), prefixes.shape[1])
    return _sequences(model, prefixes, given, piece, length, seed, sure=prefixes.shape[1] + SURE - 1)


def _sequences(
    model: Any, prefixes: Tensor, given: Tensor, piece: int, length: int, seed: int, sure: int = 0
) -> Tensor:
    """Written pieces, several of them a sequence."""
    batches = zip(torch.split(prefixes, PIECES_AT_ONCE), torch.split(given, PIECES_AT_ONCE), strict=True)
    rows = torch.cat([written(model, *batch, piece, seed + number, sure).cpu() for number, batch in enumerate(batches)])
    each = length // piece
    return rows[: len(rows) // each * each].view(-1, each * piece)
