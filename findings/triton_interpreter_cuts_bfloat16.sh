#!/bin/bash
# Triton's interpreter, which runs kernels on a CPU for tests, cuts fp32 off where a kernel converts to bfloat16; a GPU
# rounds to nearest, as the language says that `to` does, and as the interpreter itself does for float16. So half of a
# kernel's bfloat16 results are one step too small in such tests, always towards zero. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0 torch==2.13.0 numpy==2.4.6
cat > "$folder/convert.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def convert(source, target, count: tl.constexpr):
    place = tl.arange(0, count)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


values = torch.linspace(1, 2, 64)
cut = (values.view(torch.int32) & -65536).view(torch.float32)
results = {}
print("triton", triton.__version__, "torch", torch.__version__)
for dtype in (torch.bfloat16, torch.float16):
    results[dtype] = torch.empty(64, dtype=dtype)
    convert[(1,)](values, results[dtype], 64)
    print(f"{dtype}: {int((results[dtype] != values.to(dtype)).sum())} of 64 are not the nearest")
is_cut = torch.equal(results[torch.bfloat16].float(), cut) and not torch.equal(cut, values.bfloat16().float())
print("bfloat16 is the upper half of the fp32's bits:", is_cut)
sys.exit(0 if is_cut and torch.equal(results[torch.float16], values.half()) else 1)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/convert.py"
