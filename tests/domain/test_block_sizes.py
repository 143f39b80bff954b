"""Sizes of matrices in llama.cpp's types, as dry runs tell them, against what is packed of one."""

import pytest
import torch

from app.domain.formats import ExportFormat
from app.domain.methods import BLOCK_SCHEMES, Form, Scheme, SchemeName
from app.domain.sizes.files import Matrix, stored_in
from tests.formats.examples import Made, random_result
from workers.formats import native
from workers.formats.gguf.blocks import pack
from workers.numerics.quantized import BlockWeight


@pytest.mark.parametrize("columns", [512, 320])
@pytest.mark.parametrize("name", sorted(BLOCK_SCHEMES))
def test_what_is_told_is_what_is_packed(name: SchemeName, columns: int) -> None:
    wanted, shape = Scheme.named(name), (6, columns)
    made = random_result(shape, Made(wanted.fitted(columns), Form.BLOCKS), torch.bfloat16)
    matrix = Matrix(shape, wanted)
    assert isinstance(made.weight, BlockWeight)
    assert stored_in(ExportFormat.GGUF, matrix, 2).size == pack("x", made.weight).data.numel()
    parts = native.compress("x", made)
    told = stored_in(ExportFormat.NATIVE, matrix, 2)
    assert told.size == sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    assert told.tensors == len(parts)
    assert stored_in(ExportFormat.MERGED, matrix, 2).size == 2 * 6 * columns
