"""Experts that come one by one become one tensor of a file; a stack of several types, or with a gap, is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from bitwright.errors import FormatCannotHold
from workers.formats.gguf.collected import Collected


def octets(value: float, rows: int = 2, columns: int = 8) -> torch.Tensor:
    return torch.full((rows, columns), value).view(torch.uint8)


def written(folder: Path, collected: Collected) -> dict[str, np.ndarray]:
    collected.write(gguf.GGUFWriter(folder / "file.gguf", "llama"))
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "file.gguf").tensors}


def test_a_stack_is_one_tensor_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    collected = Collected(tmp_path / "parts")
    for slot in (2, 0, 1):
        collected.add("blk.0.ffn_up_exps.weight", octets(float(slot)), Kind.F32, slot=slot, of=3)
        collected.add(f"blk.{slot}.attn_q.weight", octets(10.0 + slot), Kind.F32)
    found = written(tmp_path, collected)
    assert found["blk.0.ffn_up_exps.weight"].shape == (3, 2, 8)
    assert found["blk.0.ffn_up_exps.weight"][:, 0, 0].tolist() == [0, 1, 2]
    assert found["blk.1.attn_q.weight"].tolist() == np.full((2, 8), 11).tolist()
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(("kind", "rows"), [(Kind.F16, 2), (Kind.F32, 3)])
def test_experts_of_several_types_or_shapes_are_refused(kind: Kind, rows: int, tmp_path: Path) -> None:
    collected = Collected(tmp_path / "parts")
    collected.add("blk.0.ffn_up_exps.weight", octets(0.0), Kind.F32, slot=0, of=2)
    with pytest.raises(FormatCannotHold, match="one tensor of one type") as refused:
        collected.add("blk.0.ffn_up_exps.weight", octets(0.0, rows), kind, slot=1, of=2)
    assert "the same scheme" in str(refused.value.hint)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    collected = Collected(tmp_path / "parts")
    collected.add("blk.0.ffn_up_exps.weight", octets(0.0), Kind.F32, slot=1, of=2)
    with pytest.raises(FormatCannotHold, match="has 1 of them"):
        written(tmp_path, collected)
