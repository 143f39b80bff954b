#!/usr/bin/env bash
# mlx 0.32.4 and gguf-py 0.19.0, MXFP4: the same name, the same layout of 32 e2m1 values under one power of two, and two rules for that
# power. gguf-py takes floor(log2(amax)) - 2, as the OCP's text suggests, so that a largest value of 6.1 to 7.9 becomes 6 and loses up to a
# quarter. mlx takes the next power where amax is 1.5 times a power of two or more, so that nothing is cut and the group's small values are
# rounded twice as coarsely. One guesses that "MXFP4, rounded to nearest" is one set of bytes whichever tool made it: of normal numbers
# three groups in ten have another scale, and the error measured on one file says nothing of the other.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile "mlx[cpu]==0.32.4" gguf==0.19.0 numpy==2.4.6
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), "gguf", version("gguf"))
MXFP4 = gguf.GGMLQuantizationType.MXFP4


def by_mlx(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exponents of the groups' scales, and the values that are read back."""
    codes, scales = mx.quantize(mx.array(x), group_size=32, bits=4, mode="mxfp4")
    values = mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    return np.array(scales).astype(int) - 127, np.array(values)


def by_gguf(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of gguf-py: a block is one byte of exponent and 16 of codes."""
    blocks = gguf.quants.quantize(x, MXFP4)
    return blocks.reshape(len(x), -1, 17)[..., 0].astype(int) - 127, gguf.quants.dequantize(blocks, MXFP4)


seen = {}
for largest in (5.0, 6.0, 7.0, 7.9, 8.0):
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = largest, 1.0, 0.5
    row = [(int(scales[0, 0]), *(float(v) for v in values[0, :3])) for scales, values in (by_mlx(x), by_gguf(x))]
    seen[largest] = tuple(row)
    print(f"{largest}, 1.0, 0.5: (exponent, values) mlx {row[0]}, gguf-py {row[1]}")

x = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
exponents, other = by_mlx(x)[0], by_gguf(x)[0]
amax = np.abs(x).reshape(64, -1, 32).max(-1)
floor = np.floor(np.log2(amax)).astype(int)
mantissa = amax / 2.0**floor
differ = float((exponents != other).mean())
print(f"normal numbers: {differ:.1%} of groups have another scale")
print(f"mlx is one power higher where amax is at least {mantissa[exponents > other].min():.4f} times a power of two")
right = (
    seen[7.0][0][0] == 1
    and seen[7.0][1][:2] == (0, 6.0)
    and seen[7.9][0][1] == 8.0
    and seen[7.9][1][1] == 6.0
    and (other == floor - 2).all()
    and (exponents - other == (mantissa > 1.5)).all()
    and 0.25 < differ < 0.35
)
sys.exit(None if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
