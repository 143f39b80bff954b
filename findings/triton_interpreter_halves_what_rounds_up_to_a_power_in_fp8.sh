#!/usr/bin/env bash
# Triton 3.9.0's interpreter, which runs kernels on a processor for tests: converting fp32 to float8e4nv or float8e5, a number that rounds up to
# a power of two becomes half of it (127 becomes 64, 1.99 becomes 1), since the mantissa overflows without its carry into the exponent. NaN
# becomes 384 in float8e4nv, the smallest numbers become 0, and some ties go the other way. One guesses what the language says and a GPU
# does: to nearest, ties to even, NaN kept, as torch's conversion on the same processor. A tolerance for FP8 (6 % a value) does not cover
# a factor of two, so a right kernel fails its test; and a test that only looks at values without rounding sees nothing.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} triton==3.9.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/convert.py" <<'PYTHON'
import math
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def to_e4m3(source, target, count: tl.constexpr):
    place = tl.arange(0, count)
    tl.store(target + place, tl.load(source + place).to(tl.float8e4nv))


@triton.jit
def to_e5m2(source, target, count: tl.constexpr):
    place = tl.arange(0, count)
    tl.store(target + place, tl.load(source + place).to(tl.float8e5))


print("triton", triton.__version__, "torch", torch.__version__)
x = torch.tensor([1.0, 1.9, 1.9375, 1.99, 7.8, 31.1, 127.0, 0.0156, 0.001, math.nan, -127.0, 3.0, 100.0, -0.5, 240.0, 448.0])
halved = [1.9375, 1.99, 7.8, 31.1, 127.0, 0.0156, -127.0]
right = True
for kernel, dtype, here in ((to_e4m3, torch.float8_e4m3fn, halved), (to_e5m2, torch.float8_e5m2, [1.9375, 1.99, 7.8, 31.1, 127.0, -127.0])):
    found = torch.empty(len(x), dtype=dtype)
    kernel[(1,)](x, found, len(x))
    for given, made, nearest in zip(x.tolist(), found.float().tolist(), x.to(dtype).float().tolist()):
        if made != nearest and not (math.isnan(made) and math.isnan(nearest)):
            print(f"{dtype}: {given:g} becomes {made:g}, nearest is {nearest:g}")
        if any(math.isclose(given, value, rel_tol=1e-6) for value in here):
            right &= made == nearest / 2
        if given in (1.0, 3.0, -0.5, 240.0) and dtype == torch.float8_e4m3fn:
            right &= made == nearest
    if dtype == torch.float8_e4m3fn:
        right &= not math.isnan(found.float()[9].item())
sys.exit(None if right else "the behaviour has changed")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/convert.py"
