"""Seeds derived from a request's seed, one per block and stage."""

import hashlib
from typing import Literal


def derived_seed(seed: int, index: int | Literal["scales", "finetune"]) -> int:
    """The seed of a block, of the tuning of all scales, or of finetuning: the same for every run of a request."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1
