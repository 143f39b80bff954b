"""Orders of rows, and numbers that llama.cpp wants otherwise than transformers stores them; pure functions."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.formats.gguf.architectures.family import Config

PART = "part of a head that is turned"
"""Field that is added to a configuration: not all of those that transformers reads are used by every model."""
QUERY_OR_KEY = re.compile(r"\.(?P<part>[qk])_proj$")


def head_dim(config: Config) -> int:
    """Width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary parameters of the layers that see the whole text, as transformers names them."""
    given = config.get("rope_parameters") or {}
    own = given.get("full_attention", given)
    return {"rope_type": "default", **(own or {})}


def turned(config: Config) -> int:
    """Numbers of a head that the rotary embedding turns."""
    return int(head_dim(config) * config[PART])


def heads_of(part: str, config: Config) -> int:
    """Heads of queries (`q`), or of keys and values."""
    heads = config["num_attention_heads"]
    return int(heads if part == "q" else config.get("num_key_value_heads") or heads)


def in_pairs(heads: int, width: int, turned: int) -> Tensor:
    """Rows of heads from two halves, as transformers turns them, to pairs of neighbours: int64 (heads * width,).

    turned   rows of a head that are turned; the others stay behind them
    """
    rows = torch.arange(heads * width).view(heads, width)
    pairs = rows[:, :turned].reshape(heads, 2, turned // 2).transpose(1, 2).flatten(1)
    return torch.cat([pairs, rows[:, turned:]], 1).flatten()


def queries_and_keys_in_pairs(name: str, config: Config) -> Tensor | None:
    """Order of the rows of q and k in llama.cpp's llama, which turns row i of a head with row i + 1."""
    found = QUERY_OR_KEY.search(name)
    return None if found is None else in_pairs(heads_of(found["part"], config), head_dim(config), turned(config))


def norms_plus_one(name: str, tensor: Tensor, config: Config) -> Tensor:
    """A norm's weight in fp32 with the one that transformers adds to it."""
    del config
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def halves(first: str, second: str, rows: int) -> Sequence[tuple[str, slice]]:
    """Two tensors of which one of the source is the first and the second half."""
    return (first, slice(0, rows // 2)), (second, slice(rows // 2, rows))


def from_groups(groups: int, each: int, width: int) -> Tensor:
    """Heads from an order by group to one that goes round all groups: int64 (groups * each * width,).

    Source: head g * each + i, of `width` rows, is the i-th of group g. File: head i * groups + g.
    """
    return torch.arange(groups * each * width).view(groups, each, width).transpose(0, 1).flatten()
