"""The order to read a checkpoint in a runtime, and the answer: one line of JSON each."""

import sys

from pydantic import BaseModel, ConfigDict, Field

HOST = (sys.executable, "-P", "-m", "workers.child.host")
"""The command of the child that obeys."""
FILE_BYTES = 4 << 30
"""Of a file that a runtime writes: logits, logs, caches."""


class ReadOrder(BaseModel):
    """Load a checkpoint, compute the logits of `ids`, and write `tokens` more. All paths are absolute.

    runtime       `transformers`, `peft`, `llama.cpp` or `vllm`
    folder        of the checkpoint, or of the adapter
    base          folder of the base that an adapter is added to; None: `folder` stands alone
    text          that the checkpoint's own tokenizer must turn into `ids`; None: it has no tokenizer
    logits        file for the logits after each token: fp32, (tokens, vocabulary), little-endian, nothing else
    log           file for everything that the runtime says
    memory_bytes  that the runtime may take
    place         folder of llama.cpp's libraries; Python of vLLM's environment
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    folder: str
    base: str | None = None
    ids: tuple[int, ...] = Field(min_length=1)
    text: str | None = None
    tokens: int = 0
    logits: str
    log: str
    memory_bytes: int
    place: str | None = None


class ReadAnswer(BaseModel):
    """The outcome of an order.

    version     of the runtime, as it says itself
    problem     what went wrong, in one line; empty: it loads and computes
    vocabulary  logits of each token
    written     token ids, greedy
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str = ""
    problem: str = ""
    vocabulary: int = Field(default=0, ge=0)
    written: tuple[int, ...] = ()
