"""Sequences that the end-to-end stage may be tuned on when there is no more text than the calibration's.

cut       windows of the text at its start, then at offsets between these: each window is another context
written   what the original model writes itself, as the engine's jobs do, after 16 to 64 tokens of places of the text
free      the same after one token drawn from all (LLM-QAT, arXiv:2305.17888)
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.against_auto_round import beginning, read_rows, windows
from workers.engine.text.generated import Generation, Pieces, free_starts

ROWS_AT_ONCE = 512


def mixed(paths: list[str]) -> list[str]:
    """Rows of several files in turn, those of a longer file at the end."""
    rows = [read_rows(path) for path in paths]
    order = sorted((place / len(own), file, place) for file, own in enumerate(rows) for place in range(len(own)))
    return [rows[file][place] for _, file, place in order]


def sequences_of(tokenizer: PreTrainedTokenizerBase, rows: list[str], length: int, count: int) -> Tensor:
    """The first `count` windows (count, length) of rows, or as many as there are, each behind the beginning of a text.

    Rows are tokenized together, which takes as many threads as there are processors.
    """
    begin = beginning(tokenizer)
    tokens: list[int] = []
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


def written_sequences(by: Generation, text: Tensor, length: int, count: int, seed: int) -> Tensor:
    """`count` sequences (count, length), of pieces that begin at places of a text (sequences, tokens)."""
    pieces = Pieces.of((count, length), seed)
    return pieces.drawn(pieces.placed(pieces.count, text, by), by)


def free_sequences(by: Generation, length: int, count: int, seed: int) -> Tensor:
    """`count` sequences (count, length), of pieces that begin with a token drawn from all but the special ones."""
    pieces = Pieces.of((count, length), seed)
    return pieces.drawn([free_starts(pieces.count, seed, by)], by)
