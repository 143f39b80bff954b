"""Loading of checkpoints in one release of transformers: run by `transformers_releases` in that release's environment.

    python loads_dequantized.py FOLDER...

Each FOLDER has a checkpoint in `compressed-tensors` and the same weights in `merged`. Prints a JSON object: the
versions, and for each way to load the packed one how many linears hold the merged one's weights bit for bit after a
forward pass, of how many, the first line of errors, and which deprecations were logged.
"""

import importlib.metadata
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

KEYS = {
    "both keys": {"run_compressed": False, "dequantize": True},
    "run_compressed: false": {"run_compressed": False},
    "dequantize: true": {"dequantize": True},
    "no key": {},
    "no key, CompressedTensorsConfig(dequantize=True)": {},
}
"""Keys of config.json by the name of the way."""


class Deprecations(logging.Handler):
    """Keeps what is logged of deprecations."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.messages.add(record.getMessage().split(". ")[0])


def main() -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    from transformers.utils import logging as their_logging

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    heard = Deprecations()
    their_logging.add_handler(heard)
    by_way: dict[str, Any] = {}
    for way, keys in KEYS.items():
        heard.messages.clear()
        their_logging.warning_once.cache_clear() if hasattr(their_logging.warning_once, "cache_clear") else None
        equal = linears = 0
        errors = set[str]()
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "(" in way else {}
        for folder in map(Path, sys.argv[1:]):
            packed, merged = folder / "compressed-tensors", load_file(folder / "merged/model.safetensors")
            with_keys(packed / "config.json", keys)
            targets = [name for name in merged if name.endswith("_proj.weight")]
            linears += len(targets)
            try:
                model = AutoModelForCausalLM.from_pretrained(packed, **options)
                model(torch.tensor([[1, 2, 3]]))  # what is loaded packed is unpacked by its first use
                state = model.state_dict()
            except Exception as error:  # whatever a release raises is what is asked for
                errors.add(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                continue
            equal += sum(name in state and torch.equal(state[name], merged[name]) for name in targets)
        by_way[way] = {"equal": equal, "linears": linears, "errors": sorted(errors), "logged": sorted(heard.messages)}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "compressed-tensors", "torch")}
    print(json.dumps({"versions": versions, "ways": by_way}))


def with_keys(file: Path, keys: dict[str, bool]) -> None:
    """Write these keys, and no other of their kind, into a config.json."""
    config = json.loads(file.read_text())
    quantization = config["quantization_config"]
    for key in ("run_compressed", "dequantize"):
        quantization.pop(key, None)
    file.write_text(json.dumps(config | {"quantization_config": quantization | keys}))


if __name__ == "__main__":
    main()
