"""Loads a downloaded checkpoint as a user would: in a fresh Python process that knows nothing of Bitwright.

The process may be started before there is a checkpoint: to import torch and transformers takes it seconds.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from app.idle_threads import waiting
from bitwright.errors import InternalError

LOAD_SECONDS = 600

SCRIPT = """
import gc, json, sys, time
from pathlib import Path
started = time.monotonic()
gc.disable()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
gc.enable()
seconds = time.monotonic() - started
folder, prompt, tokens = json.loads(sys.stdin.readline())
started = time.monotonic()
if (Path(folder) / "load_bitwright.py").exists():
    sys.path.insert(0, folder)
    from load_bitwright import load
    loader, model = "load_bitwright.py", load(folder)
else:
    loader, model = "transformers", AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
seconds += time.monotonic() - started
inputs = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id,
    )
text = tokenizer.decode(output[0], skip_special_tokens=True)
print(json.dumps({"text": text, "seconds": seconds, "loader": loader,
                  "new_tokens": int(output.shape[1] - inputs["input_ids"].shape[1])}))
"""


@dataclass(frozen=True)
class Loaded:
    """Result of the fresh process: `text` with the prompt, seconds to import and load, number of tokens added."""

    text: str
    seconds: float
    loader: str
    new_tokens: int


class FreshPython:
    """A process that has nothing but torch and transformers and waits for a folder. Leaving the `with` block ends it.

    `-I` keeps this project's folder, the user's site and PYTHON* variables out of the process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it, unless it runs."""
        with self._lock:
            if self._process is None:
                pipe = subprocess.PIPE
                command = [sys.executable, "-I", "-c", SCRIPT]
                calm = {**os.environ, **waiting()}
                self._process = subprocess.Popen(command, env=calm, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def load_and_generate(self, folder: Path, prompt: str, *, new_tokens: int = 32) -> Loaded:
        """Load the checkpoint in `folder` and go on with `prompt`, greedily; once.

        Raises:
            InternalError: the checkpoint does not load or generates nothing; the process's own words are in it.
        """
        self.start()
        assert self._process is not None  # noqa: S101 (started)
        order = json.dumps([str(folder), prompt, new_tokens]) + "\n"
        try:
            said, errors = self._process.communicate(order, timeout=LOAD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise InternalError(f"the checkpoint in {folder} did not load within {LOAD_SECONDS} s") from error
        if self._process.returncode != 0:
            raise InternalError(f"the checkpoint in {folder} does not load: {errors.strip()[-2000:]}")
        loaded = Loaded(**json.loads(said.splitlines()[-1]))
        if loaded.new_tokens < 1:
            raise InternalError(f"the checkpoint in {folder} loads but generates nothing")
        return loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
