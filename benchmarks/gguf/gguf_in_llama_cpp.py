"""A GGUF export in a real llama.cpp: its perplexity and tokens beside the engine's own.

    npm install --ignore-scripts node-llama-cpp@3          # in any folder; brings a built llama.cpp
    python -m benchmarks.gguf.gguf_in_llama_cpp MODEL --node-folder FOLDER

Rounds MODEL to nearest in schemes of every GGML type, writes each as GGUF, and lets both evaluate the same sequences of
builtin text. llama.cpp rounds activations to 8 bits before each product and the engine computes in the model's dtype,
so that the two agree to a fraction of a percent and not to the last digit. Prints one JSON line per scheme.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from app.domain.request.job_request import Evaluation, JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

SCRIPT = Path(__file__).with_name("in_llama_cpp.mjs")
TEXT = "Hello world, 1234 it's été\n\n  def f(x):  return"
SCHEMES = [(4, True), (5, True), (8, True), (3, False), (5, False)]
"""Bits and symmetry: Q4_0, Q5_0, Q8_0, Q4_1, Q5_1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--node-folder", type=Path, required=True, help="where node-llama-cpp is installed")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    evaluation = Evaluation(num_samples=arguments.sequences, sequence_length=arguments.length)
    tokenizer = load_tokenizer(arguments.model)
    sequences = evaluation_sequences(tokenizer, evaluation, None, 0, None).ids.tolist()
    for bits, symmetric in SCHEMES:
        scheme = {"bits": bits, "symmetric": symmetric, "group_size": arguments.group_size}
        with tempfile.TemporaryDirectory() as folder:
            ours = quantize(arguments.model, Path(folder), scheme, evaluation)
            theirs = in_llama_cpp(Path(folder) / "output/gguf/model.gguf", sequences, arguments.node_folder)
        same = theirs["tokens"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        print(json.dumps({**scheme, **ours, "llama_cpp": theirs["perplexity"], "same_tokens": same}), flush=True)


def quantize(model: Path, workspace: Path, scheme: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Perplexity before and after by the engine; the file lies in the workspace's output."""
    body = {"model": str(model), "quantization": {"method": "rtn", **scheme}, "formats": ["gguf"]}
    request = JobRequest.parse(body | {"evaluation": evaluation.model_dump(mode="json")})
    order = AttemptOrder(job_id="job_1", attempt=1, request=request, model_path=str(model), device="cpu")
    report = run(order, workspace, Reporter(lambda _: None)).report
    assert report.quality is not None
    return {
        "original": report.quality.perplexity_original,
        "engine": report.quality.perplexity,
        "warnings": report.warnings,
    }


def in_llama_cpp(file: Path, sequences: list[list[int]], node_folder: Path) -> dict[str, Any]:
    """Perplexity and tokens by llama.cpp."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids:
        ids.write(json.dumps(sequences))
        ids.flush()
        command = ["node", str(SCRIPT), str(file), ids.name, TEXT]
        done = subprocess.run(command, cwd=node_folder, check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


if __name__ == "__main__":
    main()
