"""Logits and perplexity of a checkpoint in vLLM, as JSON: run by `test_vllm.py` with the Python of vLLM's environment.

    python in_vllm.py CASE.json

CASE.json holds `model` (a folder), `adapter` (a folder or null), `rank`, `prompt` (token ids) and `tokens` (how many to
write). The last line of the output is a JSON object: `version`, and either `error` (vLLM's own words), or `logprobs`
(of every token of the vocabulary, at every position of the prompt but the first) and `written` (token ids, greedy).
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import vllm

    case = json.loads(Path(sys.argv[1]).read_text())
    answer = {"version": vllm.__version__}
    try:
        answer |= run(case)
    except Exception as error:  # vLLM's refusals have no type of their own, and their words are what the test reads
        answer["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    vocabulary = json.loads((Path(case["model"]) / "config.json").read_text())["vocab_size"]
    model = LLM(
        case["model"],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=vocabulary,
        enable_lora=case["adapter"] is not None,
        max_lora_rank=case["rank"],
    )
    adapter = LoRARequest("adapter", 1, case["adapter"]) if case["adapter"] else None
    wanted = SamplingParams(temperature=0, max_tokens=case["tokens"], ignore_eos=True, prompt_logprobs=vocabulary)
    (found,) = model.generate([{"prompt_token_ids": case["prompt"]}], wanted, lora_request=adapter, use_tqdm=False)
    rows = [[row[token].logprob for token in range(vocabulary)] for row in found.prompt_logprobs[1:]]
    return {"logprobs": rows, "written": list(found.outputs[0].token_ids)}


if __name__ == "__main__":
    main()
