"""Orders of rows, by what they are for: the same numbers out of llama.cpp's way to compute."""

import pytest
import torch

from workers.formats.gguf.architectures.older import by_kind, falcon_order
from workers.formats.gguf.architectures.recurrent import next_split, tiled_outputs, tiled_values
from workers.formats.gguf.architectures.rows import PART, in_pairs, norms_plus_one, queries_and_keys_in_pairs

HEADS, WIDTH = 3, 8


def turned_by_halves(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A head's rows i and i + n/2 as a plane, as transformers has them."""
    first, second = rows.chunk(2)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def turned_by_pairs(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A head's rows 2i and 2i + 1 as a plane, as GGML has them."""
    planes = torch.view_as_complex(rows.view(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(planes).flatten()


@pytest.mark.parametrize("turned", [8, 4])
def test_rows_in_pairs_turn_as_halves_do(turned: int) -> None:
    order = in_pairs(HEADS, WIDTH, turned)
    query, key = torch.randn(2, HEADS * WIDTH, dtype=torch.float64)
    angles = torch.rand(2, turned // 2, dtype=torch.float64)
    for head in range(HEADS):
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        theirs = [
            turned_by_halves(each[rows][:turned], angle) for each, angle in zip((query, key), angles, strict=True)
        ]
        ours = [
            turned_by_pairs(each[order][rows][:turned], angle) for each, angle in zip((query, key), angles, strict=True)
        ]
        assert torch.allclose(theirs[0] @ theirs[1], ours[0] @ ours[1])
        assert torch.equal(query[order][rows][turned:], query[rows][turned:])


def test_keys_have_heads_of_their_own_and_others_keep_their_order() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, PART: 1.0}
    query = queries_and_keys_in_pairs("model.layers.0.self_attn.q_proj", config)
    key = queries_and_keys_in_pairs("model.layers.0.self_attn.k_proj", config)
    assert query is not None
    assert key is not None
    assert query.tolist()[:4] == key.tolist()[:4] == [0, 2, 1, 3]
    assert (len(query), len(key)) == (16, 8)
    assert queries_and_keys_in_pairs("model.layers.0.self_attn.v_proj", config) is None


def test_one_is_added_to_norms_in_fp32() -> None:
    norm = torch.tensor([2.0**-9, -0.5], dtype=torch.bfloat16)
    assert norms_plus_one("model.norm.weight", norm, {}).tolist() == [1 + 2.0**-9, 0.5]
    assert norms_plus_one("model.layers.0.mlp.up_proj.weight", norm, {}) is norm


def test_rows_of_q_k_and_v_of_every_head_come_apart() -> None:
    config = {"num_attention_heads": 2, "hidden_size": 4}
    order = by_kind("h.0.self_attention.query_key_value", config)
    assert order is not None
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_rows_of_falcons_groups_come_apart() -> None:
    config = {"num_attention_heads": 4, "hidden_size": 4, "new_decoder_architecture": True, "num_kv_heads": 2}
    order = falcon_order("transformer.h.0.self_attention.query_key_value", config)
    assert order is not None
    assert order.tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 2,
}


def test_values_go_round_the_keys() -> None:
    """Two heads of values for each of keys: transformers has those of key 0 first, GGML repeats the keys."""
    order = tiled_values("model.layers.0.linear_attn.in_proj_z", DELTA)
    assert order is not None
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    whole = tiled_values("model.layers.0.linear_attn.in_proj_qkv", DELTA)
    assert whole is not None
    assert whole.tolist() == [*range(8), *(8 + row for row in order.tolist())]
    heads = tiled_values("model.layers.0.linear_attn.A_log", DELTA)
    assert heads is not None
    assert heads.tolist() == [0, 2, 1, 3]


def test_what_reads_the_values_has_its_columns_in_their_order() -> None:
    weight, values = torch.randn(3, 8), torch.randn(8)
    order = tiled_values("model.layers.0.linear_attn.in_proj_z", DELTA)
    name = "model.layers.0.linear_attn.out_proj.weight"
    made = tiled_outputs(name, weight, DELTA)[name]
    assert torch.allclose(made @ values[order], weight @ values, atol=1e-6)


def test_q_k_v_and_z_of_each_key_come_apart() -> None:
    (first, qkv), (second, z) = next_split("model.layers.5.linear_attn.in_proj_qkvz", 24, DELTA) or ()
    assert (first, second) == ("=blk.5.attn_qkv", "=blk.5.attn_gate")
    assert isinstance(qkv, torch.Tensor)
    assert isinstance(z, torch.Tensor)
    assert qkv.tolist() == [0, 1, 12, 13, 2, 3, 14, 15, 4, 5, 6, 7, 16, 17, 18, 19]
    assert z.tolist() == [8, 9, 10, 11, 20, 21, 22, 23]
