"""Proves types and writes the list of those that are accepted: python -m tests.engine.architectures [TYPE ...].

Rows of the types that are named, or of all, are made again; a type of which anything is wrong loses its row.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

from app.domain.inputs.architectures import ACCEPTED_FILE
from tests.engine.architectures.configurations import TYPES, save_random
from tests.engine.architectures.proofs import (
    CPU,
    WEIGHTS,
    deviation,
    difference,
    format_refusals,
    proved_job,
    save_tokenizer,
    touched,
)
from tests.engine.architectures.titles import REFUSED, TITLES
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel

TOLERANCE, CLOSE = 1e-4, 0.005
"""Of streamed logits, in standard deviations; and of a checkpoint's perplexity, relative to the report's."""
TUNED: dict[str, Any] = {"method": "signround", "steps": 4, "batch_size": 4}


def main(names: list[str]) -> int:
    """Proves these types, or all; the number of those that failed."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    stored = json.loads(ACCEPTED_FILE.read_text(encoding="utf-8"))
    rows, failed = stored["types"], 0
    for name in names or list(TYPES):
        row, wrong = proved(name)
        failed += bool(wrong)
        say(f"{name:20} {'; '.join(wrong) or 'proved'}")
        rows.pop(name, None)
        if row is not None and not wrong:
            rows[name] = row
        order = {model_type: number for number, model_type in enumerate(TYPES)}
        rows = {key: rows[key] for key in sorted(rows, key=lambda key: order.get(key, len(order)))}
        stored = {"transformers": transformers.__version__, "types": rows, "refused": REFUSED}
        ACCEPTED_FILE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return failed


def proved(name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The row of a type, None if it is not accepted; and everything that went wrong."""
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        try:
            whole = save_random(model, name)
            far = difference(model, whole)
        except Exception as error:
            return None, [f"{type(error).__name__}: {error}"[:200]]
        if not far < TOLERANCE:
            return None, [f"streamed logits differ by {far:.1e}"]
        save_tokenizer(model)
        row: dict[str, Any] = {"title": TITLES[name], "class": type(whole).__name__, "streamed": float(f"{far:.1e}")}
        refusals = format_refusals(StreamedModel.unproved(Checkpoint.open(model), CPU))
        jobs, wrong = _jobs(model, Path(place), refusals)
        return row | {"refusals": refusals, "perplexity": jobs}, wrong


def _jobs(model: Path, place: Path, refusals: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    """How far each checkpoint's perplexity is from its report's, and what else is wrong."""
    packed = [] if "compressed-tensors" in refusals else ["compressed-tensors"]
    found: dict[str, float] = {}
    wrong: list[str] = []
    for request in ({"method": "rtn", "formats": ["merged", *packed]}, TUNED | {"formats": ["merged"]}):
        folder = place / str(request["method"])
        try:
            with (
                patch("workers.engine.model.streamed_model.find_architecture"),
                patch("app.domain.format_rules._type_refusals", return_value=[]),
                patch("workers.engine.weights_only.chosen", return_value=False),
            ):
                report, ids = proved_job(model, folder, **request)
        except Exception as error:
            wrong.append(f"{request['method']}: {type(error).__name__}: {error}"[:200])
            continue
        for name in dict.fromkeys([*request["formats"], *(["native"] if request["method"] == "rtn" else [])]):
            try:
                off, keys = deviation(folder / "output" / name, report, ids)
            except Exception as error:
                if name == "compressed-tensors" and str(error).endswith("has no attribute 'weight'"):
                    refusals[name] = WEIGHTS
                    continue
                wrong.append(f"{request['method']}, {name}: {type(error).__name__}: {error}"[:200])
                continue
            found[f"{request['method']}, {name}"] = float(f"{off:.1e}")
            if name == "merged":
                wrong += [f"{request['method']}: {key} was touched" for key in touched(model, folder / "output" / name)]
            wrong += [f"{request['method']}, {name}: {key}" for key in keys]
            wrong += [f"{request['method']}, {name}: perplexity off by {off:.1%}"] if off > CLOSE else []
    return found, wrong


def say(line: str) -> None:
    """Writes one line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
