"""Loads a downloaded checkpoint as a user would: in a fresh Python process that knows nothing of Bitwright."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import InternalError

LOAD_SECONDS = 600

SCRIPT = """
import json, sys, time
from pathlib import Path
folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
started = time.monotonic()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
if (Path(folder) / "load_bitwright.py").exists():
    sys.path.insert(0, folder)
    from load_bitwright import load
    loader, model = "load_bitwright.py", load(folder)
else:
    loader, model = "transformers", AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
seconds = time.monotonic() - started
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
    """Result of the fresh process: `text` with the prompt, seconds to load, number of tokens that it added."""

    text: str
    seconds: float
    loader: str
    new_tokens: int


def load_and_generate(folder: Path, prompt: str, *, new_tokens: int = 32) -> Loaded:
    """Load the checkpoint in `folder` and go on with `prompt`, greedily.

    `-I` keeps this project's folder, the user's site and PYTHON* variables out of the process.

    Raises:
        InternalError: the checkpoint does not load or generates nothing; the process's own words are in it.
    """
    command = [sys.executable, "-I", "-c", SCRIPT, str(folder), prompt, str(new_tokens)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InternalError(f"the checkpoint in {folder} did not load within {LOAD_SECONDS} s") from error
    if done.returncode != 0:
        raise InternalError(f"the checkpoint in {folder} does not load: {done.stderr.strip()[-2000:]}")
    loaded = Loaded(**json.loads(done.stdout.splitlines()[-1]))
    if loaded.new_tokens < 1:
        raise InternalError(f"the checkpoint in {folder} loads but generates nothing")
    return loaded
