"""The importance matrix of a file: what its calibration text put into the linears, as llama.cpp's quantizer reads it.

    NAME.in_sum2   fp32 (matrices, columns)   sum over tokens of x_j^2, of the original model
    NAME.counts    fp32 (matrices, 1)         number of tokens

NAME is the tensor's in the model's file, with its `.weight`; a tensor that holds experts has a matrix for each. The
format is that of `llama-imatrix` (llama.cpp v0.5.0, `common/imatrix-loader.cpp` and `tools/imatrix`), which divides the
sums by the counts, and takes all columns of an expert without tokens as equal. With it another mix can be made of the
original model: `llama-quantize --imatrix model.imatrix model-bf16.gguf model-q3.gguf Q3_K_M`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys

from bitwright.report import TextReport
from workers.contracts.input_squares import COUNTS, SUMS, InputSquares
from workers.formats.cards.identity import last_segment

FILE = "model.imatrix"
Matrices = Mapping[int, InputSquares]
"""Squares of the matrices of one tensor, by their place in it."""


def write_importance(file: Path, architecture: str, text: TextReport, tensors: Mapping[str, Matrices]) -> None:
    """Write the file.

    text      the calibration text
    tensors   by name in the model's file
    """
    writer = GGUFWriter(file, architecture)
    writer.add_type(GGUFType.IMATRIX)
    writer.add_array(Keys.IMatrix.DATASETS, [last_segment(text.source)])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, text.num_samples)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, text.sequence_length)
    for name, matrices in tensors.items():
        columns = len(next(iter(matrices.values())).sums)
        sums = np.zeros((max(matrices) + 1, columns), np.float32)
        counts = np.zeros((max(matrices) + 1, 1), np.float32)
        for place, squares in matrices.items():
            sums[place], counts[place] = squares.sums.numpy(), squares.count
        writer.add_tensor(f"{name}.{SUMS}", sums)
        writer.add_tensor(f"{name}.{COUNTS}", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
