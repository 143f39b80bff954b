"""lm-eval's own numbers on rows of tasks, by the Python of an environment that has it and none of this project.

    PYTHON -P tests/engine/tasks/lm_eval_numbers.py MODEL ROWS OUT

ROWS is a folder with choices.jsonl, answers.jsonl and texts.jsonl; OUT becomes JSON with every figure and every row's
scores. fp32, on the CPU, one row at a time.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "filter_list": [{"name": "plain", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}


def main(model: str, rows: str, out: str) -> None:
    from lm_eval import __version__, simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for name, task in TASKS.items():
            files = {"data_files": {"test": str(Path(rows).absolute() / f"{name}.jsonl")}}
            written = yaml.safe_dump({"task": f"rows_{name}", **COMMON, "dataset_kwargs": files, **task})
            Path(folder, f"{name}.yaml").write_text(written)
        found = simple_evaluate(
            model=HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=1),
            tasks=[f"rows_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=10,
            log_samples=True,
        )
    numbers = {"lm_eval": __version__, "results": found["results"]}
    numbers["rows"] = {
        name: [sample["filtered_resps"] for sample in samples] for name, samples in found["samples"].items()
    }
    Path(out).write_text(json.dumps(numbers, indent=1, sort_keys=True, default=str) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
