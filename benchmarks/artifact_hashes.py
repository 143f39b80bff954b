"""SHA-256 of every file that each method, format and adapter ships on a tiny model, for comparing two commits.

    python -m benchmarks.artifact_hashes OUT.json

Runs one job per row of `JOBS`, and one for each method and format that no row names, in this process on the CPU with
one thread. report.json and report.html are left out (they have times); of a model card only its
section "Load" is compared.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from app.domain.formats import ExportFormat
from app.domain.methods import METHODS
from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import Recipe, make_tiny_model

RECIPE = Recipe(vocabulary=400, width=64, intermediate=192, blocks=2, positions=256, steps=30, batch=4, length=64)
TEXTS = {
    "calibration": {"num_samples": 8, "sequence_length": 32},
    "evaluation": {"num_samples": 2, "sequence_length": 48},
}
FINETUNE = {"dataset": {"source": "local", "path": "/rows"}, "steps": 6, "sequence_length": 48, "batch_size": 4}
W4 = {"bits": 4, "group_size": 32}

JOBS: dict[str, dict[str, Any]] = {
    "rtn": {**W4, "method": "rtn", "formats": ["compressed-tensors", "merged"]},
    "rtn-2-asymmetric": {"method": "rtn", "bits": 2, "group_size": 32, "symmetric": False},
    "rtn-8-channel": {"method": "rtn", "bits": 8, "group_size": -1},
    "rtn-gguf": {**W4, "method": "rtn", "formats": ["gguf"]},
    "nf": {"method": "nf", "bits": 4, "formats": ["merged"]},
    "gptq": {**W4, "method": "gptq"},
    "awq": {**W4, "method": "awq"},
    "omniquant": {**W4, "method": "omniquant", "epochs": 2},
    "signround": {**W4, "method": "signround", "steps": 12, "scale_steps": 0},
    "signround-scales": {**W4, "method": "signround", "steps": 12, "scale_steps": 6, "symmetric": False},
    "loftq": {"method": "loftq", "bits": 4, "rank": 4, "formats": ["merged", "peft"]},
    "apiq": {**W4, "method": "apiq", "rank": 4, "steps": 8, "formats": ["compressed-tensors", "peft"]},
    "apiq-layer": {**W4, "method": "apiq", "rank": 4, "steps": 8, "granularity": "layer", "formats": ["merged"]},
    "lq-lora": {"method": "lq-lora", "bits": 3, "rank": 4, "formats": ["merged"]},
    "qlora": {"method": "qlora", "rank": 4, "finetune": FINETUNE},
    "qa-lora": {**W4, "method": "qa-lora", "rank": 4, "finetune": FINETUNE},
    "qa-lora-merged": {
        **W4,
        "method": "qa-lora",
        "rank": 4,
        "finetune": FINETUNE,
        "merge": "quantized",
        "round_offset": True,
    },
    "q-bara": {**W4, "method": "q-bara", "rank": 4, "finetune": FINETUNE},
    "qa-hira": {**W4, "method": "qa-hira", "rank": 4, "finetune": FINETUNE},
    "bayesian-lora": {**W4, "method": "bayesian-lora", "rank": 4, "finetune": FINETUNE},
    "qlora-16bit": {"method": "qlora", "rank": 4, "finetune": FINETUNE, "merge": "16bit", "formats": ["merged"]},
}


def all_jobs() -> dict[str, dict[str, Any]]:
    """`JOBS`, and a plain job for each other method of the catalogue and format of the table."""
    methods = {job["method"] for job in JOBS.values()}
    formats = {name for job in JOBS.values() for name in job.get("formats", ())}
    models = [name.value for name in ExportFormat if not name.info.is_adapter and not name.info.always_kept]
    return (
        JOBS
        | {name: {**W4, "method": name} for name in METHODS if name not in methods}
        | {f"rtn-{name}": {**W4, "method": "rtn", "formats": [name]} for name in models if name not in formats}
    )


def files(folder: Path) -> Iterator[tuple[str, str]]:
    """Path and hash of each file of a checkpoint."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in ("report.json", "report.html"):
            continue
        data = path.read_bytes()
        if name == "README.md":
            loading = re.search(r"^## Load\n(.*?)(?=^## )", data.decode(), re.M | re.S)
            data = b"" if loading is None else loading.group(1).encode()
        yield name, hashlib.sha256(data).hexdigest()


def hashes(name: str, body: dict[str, Any], model: Path, rows: Path, workspace: Path) -> dict[str, str]:
    """Hashes by path of all that one job ships."""
    request = JobRequest.parse(json.loads(json.dumps({"model": str(model), **TEXTS, **body})))
    order = AttemptOrder(
        job_id="job_1", attempt=1, request=request, model_path=str(model), device="cpu", finetuning_path=str(rows)
    )
    result = run(order, workspace, Reporter(lambda _: None))
    return {
        f"{name}/{kind}/{path}": digest
        for kind, folder in result.checkpoints.items()
        for path, digest in files(workspace / folder)
    }


def main() -> None:
    """The command line: one argument, the file to write."""
    torch.set_num_threads(1)
    by_file: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", RECIPE)
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(
            "".join(json.dumps({"prompt": f"{i} and {i}", "completion": f" is {2 * i}."}) + "\n" for i in range(60))
        )
        for name, body in all_jobs().items():
            try:
                by_file |= hashes(name, body, model, rows, Path(folder) / "jobs" / name)
            except Exception as error:  # a job that fails is a difference too
                by_file[name] = f"{type(error).__name__}: {error}"
            print(name, len(by_file), file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(by_file, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
