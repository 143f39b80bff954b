"""A checkpoint in vLLM: run as a file by the Python of vLLM's own environment, which has nothing of ours.

Reads one order, a line of JSON (`workers.runtimes.order.ReadOrder`), and writes one answer. Everything that vLLM prints
goes to standard error.
"""

import json
import math
import os
import sys
from array import array
from pathlib import Path
from typing import Any

SPARE_TOKENS = 16
SMALLEST_CONTEXT = 64


def main() -> None:
    """One order, one answer."""
    answers = os.dup(1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    # Of one process: no engine in another that could outlive this one, and no compiler for what runs once.
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("TORCH_COMPILE_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)
    import vllm  # noqa: PLC0415 - after the variables that it reads when it is imported

    answer: dict[str, Any] = {"version": vllm.__version__}
    try:
        answer |= read(order)
    except Exception as error:  # vLLM's refusals have no type of their own
        import traceback  # noqa: PLC0415

        traceback.print_exc()
        answer["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
    os.write(answers, json.dumps(answer).encode() + b"\n")
    sys.stderr.flush()
    os._exit(0)


def read(order: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities in place of logits, from which they differ by a constant a row."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    folder, adapter = order["base"] or order["folder"], order["folder"] if order["base"] else None
    ids, tokens = order["ids"], max(1, order["tokens"])
    config = json.loads((Path(folder) / "config.json").read_text())
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    lora = {"enable_lora": True, "max_lora_rank": rank_of(adapter)} if adapter else {}
    context = max(SMALLEST_CONTEXT, len(ids) + tokens + SPARE_TOKENS)
    model = LLM(
        folder,
        skip_tokenizer_init=order["text"] is None,
        enforce_eager=True,
        max_model_len=context,
        max_num_seqs=1,
        max_logprobs=vocabulary,
        **lora,
        **_memory(),
    )
    if order["text"] is not None:
        made = list(model.get_tokenizer()(order["text"])["input_ids"])
        if made != list(ids):
            return {"problem": f"the checkpoint's tokenizer makes {made[:8]} of a text that is {ids[:8]}"}
    wanted = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=vocabulary, logprobs=vocabulary,
        detokenize=False,
    )  # fmt: skip
    beside = LoRARequest("adapter", 1, adapter) if adapter else None
    (found,) = model.generate([{"prompt_token_ids": ids}], wanted, lora_request=beside, use_tqdm=False)
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    with Path(order["logits"]).open("wb") as stream:
        for row in rows:
            array("f", [row[n].logprob if n in row else -math.inf for n in range(vocabulary)]).tofile(stream)
    written = list(found.outputs[0].token_ids) if order["tokens"] else []
    return {"vocabulary": vocabulary, "written": written}


def _memory() -> dict[str, float]:
    """The share of a GPU that vLLM may take: most of what the job beside it leaves."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": min(0.9, 0.9 * free / total)}


def rank_of(adapter: str) -> int:
    """The smallest rank that vLLM takes and that holds an adapter."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    needed = max([config["r"], *config.get("rank_pattern", {}).values()])
    return min(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= needed)


if __name__ == "__main__":
    main()
