"""Sequences that the end-to-end stage may be tuned on when there is no more text than the calibration's.

cut       windows of the text at its start, then at offsets between these: each window is another context
written   what the original model writes itself, at temperature 1, after 16 to 64 tokens of places of the text
          (as LLM-QAT has it, arXiv:2305.17888, which begins with a single token)
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from benchmarks.against_auto_round import beginning, windows

SHORTEST, LONGEST = 16, 64
"""Tokens of the text before a written piece."""
PIECE = 512
"""Tokens of a piece; several make a sequence. The shorter, the nearer to the text."""
PIECES_AT_ONCE = 2048


def mixed(paths: list[str]) -> str:
    """Rows of several files in turn, those of a longer file at the end."""
    rows = [[json.loads(line)["text"] for line in Path(path).read_text().splitlines()] for path in paths]
    order = sorted((place / len(own), file, place) for file, own in enumerate(rows) for place in range(len(own)))
    return "\n\n".join(rows[file][place] for _, file, place in order)


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
def written(model: Any, prefixes: Tensor, length: int, seed: int) -> Tensor:
    """Sequences (pieces, length) that a model goes on with after places of a text.

    model      of transformers, on its device
    prefixes   (pieces, LONGEST): of each the first SHORTEST to LONGEST tokens are taken, at random
    """
    device, generator = model.device, torch.Generator(model.device).manual_seed(seed)
    given = torch.randint(SHORTEST, LONGEST + 1, (len(prefixes),), generator=generator, device=device)
    prefixes, cache = prefixes.to(device), DynamicCache()
    ids = prefixes[:, :SHORTEST]
    states = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for place in range(SHORTEST, length):
        odds = states.logits[:, -1].float().softmax(-1)
        token = torch.multinomial(odds, 1, generator=generator)
        if place < LONGEST:
            token = torch.where((place < given).unsqueeze(1), prefixes[:, place : place + 1], token)
        ids = torch.cat([ids, token], dim=1)
        if place + 1 < length:
            states = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return ids


def written_sequences(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int, seed: int
) -> Tensor:
    """`count` sequences (count, length), of pieces that begin at places of the text which are drawn without order."""
    piece = min(PIECE, length)
    places = cut(tokenizer, text, piece, count * (length // piece))
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    pieces = [
        written(model, places[chosen, :LONGEST], piece, seed + number).cpu()
        for number, chosen in enumerate(torch.split(order, PIECES_AT_ONCE))
    ]
    rows = torch.cat(pieces)
    each = length // piece
    return rows[: len(rows) // each * each].view(-1, each * piece)
