"""Test of Triton by use: whether a kernel can be compiled, loaded and run here, and if not, what is missing.

That the package is there says little: at run time it needs a C compiler, Python's headers, the GPU's driver, and a
folder that is writable and from which programs may be loaded. `python -m workers.numerics.backends.trial` writes the
reason, or nothing where all works.
"""

import os
import sys

import torch

SHOWN = 300
"""Characters of a reason."""


def triton_fault(device: torch.device) -> str | None:
    """Reason for which Triton's kernels do not run on the device, in one line; None if they do."""
    try:
        return _run(device)
    except Exception as error:  # a compiler's, a driver's and a loader's own kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:SHOWN]


def _run(device: torch.device) -> str | None:
    from workers.numerics.backends.trial_kernel import increment  # noqa: PLC0415 (imports triton)

    numbers = torch.arange(64, dtype=torch.float32, device=device)
    increment[(1,)](numbers, 64)
    if not torch.equal(numbers.cpu(), torch.arange(1, 65, dtype=torch.float32)):
        return "WrongResult: a kernel that adds one does not"
    return None


def main() -> int:
    """Write the reason for the first GPU. What a compiler says besides goes to standard error."""
    answer = os.dup(1)
    os.dup2(2, 1)
    fault = triton_fault(torch.device("cuda", 0))
    os.write(answer, (fault or "").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
