"""Asymmetric compressed-tensors checkpoints in several releases of transformers: which keys of config.json they need.

    python -m benchmarks.loading.transformers_releases 5.17.0 5.23.0

Rounds the tiny model to nearest with zero points in 2 to 8 bits, by groups and per channel; installs each release of
transformers into an environment of its own, beside our other packages; and compares there every linear, loaded by each
combination of keys, with the weight that was written. Prints a table.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import make_tiny_model

SCRIPT = Path(__file__).with_name("loads_dequantized.py")
OLDER = {"5.17.0": ["huggingface_hub==1.33.0"]}
"""Packages that a release needs in a version of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="+")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        folders = [
            quantize(model, Path(scratch) / f"w{bits}g{group}", {"bits": bits, "group_size": group})
            for bits in range(2, 9)
            for group in (32, -1)
        ]
        print(
            "| transformers | compressed-tensors | loaded by | linears equal | logged |",
            "|---|---|---|---|---|",
            sep="\n",
        )
        for release in arguments.releases:
            python = environment(Path(scratch) / release, [f"transformers=={release}", *OLDER.get(release, [])])
            print(table(output(python, folders)), flush=True)


def quantize(model: Path, workspace: Path, scheme: dict[str, Any]) -> Path:
    """The folder of both checkpoints."""
    body = {"model": str(model), "quantization": {"method": "rtn", "symmetric": False, **scheme}}
    body |= {"formats": ["compressed-tensors", "merged"], "evaluation": {"num_samples": 1, "sequence_length": 32}}
    workspace.mkdir()
    request = JobRequest.parse(body)
    order = AttemptOrder(job_id="job_1", attempt=1, request=request, model_path=str(model), device="cpu")
    run(order, workspace, Reporter(lambda _: None))
    return workspace / "output"


def environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a new environment that has these packages, and else ours."""
    venv.create(folder, with_pip=False)
    python, paths = folder / "bin/python", [path for path in sys.path if path.endswith("site-packages")]
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "ours.pth").write_text("\n".join(paths))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages]
    subprocess.run(command, check=True)
    return python


def output(python: Path, folders: list[Path]) -> dict[str, Any]:
    """Output of the script there."""
    command = [str(python), str(SCRIPT), *map(str, folders)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def table(answer: dict[str, Any]) -> str:
    """A row for each way."""
    versions = answer["versions"]
    rows = []
    for way, figures in answer["ways"].items():
        logged = "; ".join(figures["logged"] + figures["errors"]).replace("|", "\\|") or "nothing"
        cells = [versions["transformers"], versions["compressed-tensors"], way]
        rows.append(f"| {' | '.join(cells)} | {figures['equal']} of {figures['linears']} | {logged} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
