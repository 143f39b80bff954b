"""SignRound on random blocks of a mixture of experts, here and in auto-round: seconds, peak memory, and their ratio.

    python -m benchmarks.blocks.experts --auto-round --limit-gib 24
    python -m benchmarks.blocks.experts --device cpu --experts 8 --places 2 --hidden 64 --inner 64 --samples 16 \
        --length 64

The default is Qwen3-30B-A3B's shape (128 experts, 8 for a token, width 2048, expert width 768), 128 sequences of 512
tokens, 50 steps, W4 symmetric in groups of 128. Speed does not depend on the values, and random experts are evenly
chosen. One model of `--blocks` blocks serves both; ours is a whole job without loading, evaluation and export,
auto-round's its `quantize()` with its default way through experts, model and tokenizer loaded already. One JSON line a
side, and one with the ratio. auto-round needs the packages auto-round and datasets.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.tiny_model import Recipe, train_tokenizer, training_text

VOCABULARY = 512
SHAPE = ("experts", "places", "hidden", "inner", "heads", "key_value_heads", "samples", "length", "steps", "blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--places", type=int, default=8, help="experts that a token goes through")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="width of an expert")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-value-heads", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs; the first is cold")
    parser.add_argument("--limit-gib", type=float, help="memory of the GPU that our side may take")
    parser.add_argument("--auto-round", action="store_true", help="run the peer, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(given, folder / "model")
        text = write_text(folder / "text.jsonl")
        best: dict[str, float] = {}
        for number in range(given.rounds):
            sides = {"bitwright": ours, **({"auto-round": peer} if given.auto_round else {})}
            for side, measure in sides.items():
                line = measure(given, folder, text, number)
                best[side] = min(best.get(side, line["seconds"]), line["seconds"])
                shape = {key: value for key, value in vars(given).items() if key in SHAPE}
                print(json.dumps({"by": side, "round": number} | line | shape), flush=True)
        if given.auto_round:
            print(json.dumps({"times_faster": round(best["auto-round"] / best["bitwright"], 2)}), flush=True)


def write_model(given: argparse.Namespace, folder: Path) -> None:
    """Random blocks behind a small vocabulary, in bf16."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(training_text(), Recipe(vocabulary=VOCABULARY, positions=2048))
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        moe_intermediate_size=given.inner,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.key_value_heads,
        head_dim=max(8, min(128, given.hidden // given.heads * 2)),
        num_experts=given.experts,
        num_experts_per_tok=given.places,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    with torch.device(given.device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_text(file: Path) -> Path:
    """The reference text of Python in pieces, shuffled over and over until there is enough of it."""
    words = training_text()
    pieces = [words[start : start + 4000] for start in range(0, len(words) - 4000, 4000)]
    chosen = random.Random(0)
    rows = [json.dumps({"text": " ".join(chosen.sample(pieces, 2))}) for _ in range(400)]
    file.write_text("\n".join(rows) + "\n")
    return file


def ours(given: argparse.Namespace, folder: Path, text: Path, number: int) -> dict[str, Any]:
    body = {
        "model": str(folder / "model"),
        "quantization": {
            "method": "signround",
            "bits": given.bits,
            "group_size": given.group_size,
            "steps": given.steps,
        },
        "calibration": {
            "dataset": {"source": "local", "path": str(text)},
            "num_samples": given.samples,
            "sequence_length": given.length,
        },
        "evaluation": None,
        "formats": ["native"],
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(folder / "model"),
        calibration_path=str(text),
        device=given.device,
    )
    limited = given.limit_gib is not None and given.device == "cuda"
    if limited:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.limit_gib * 2**30 / total)
    begin(given.device)
    events: list[Any] = []
    report = run(order, folder / f"job-{number}", Reporter(events.append)).report
    if limited:
        torch.cuda.set_per_process_memory_fraction(1.0)
    working = sum(seconds for name, seconds in report.seconds.items() if name not in {"load", "export", "total"})
    least = [part.tokens_least for block in report.blocks for part in block.experts]
    return {
        "seconds": round(working, 2),
        "peak_gib": peak_gib(given.device),
        "block_seconds": [round(block.seconds, 2) for block in report.blocks],
        "losses": [[block.loss_initial, block.loss] for block in report.blocks],
        "tokens_least": least,
        "log": sorted({event.event for event in events if event.type == "log"}),
    }


def peer(given: argparse.Namespace, folder: Path, text: Path, number: int) -> dict[str, Any]:
    del number
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    begin(given.device)
    start = time.perf_counter()
    AutoRound(
        model,
        tokenizer,
        bits=given.bits,
        group_size=given.group_size,
        sym=True,
        iters=given.steps,
        nsamples=given.samples,
        seqlen=given.length,
        batch_size=8,
        dataset=str(text),
        device_map=0 if given.device == "cuda" else "cpu",
    ).quantize()
    return {"seconds": round(time.perf_counter() - start, 2), "peak_gib": peak_gib(given.device)}


def begin(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()


def peak_gib(device: str) -> float | None:
    """Most memory that tensors took since `begin`."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


if __name__ == "__main__":
    main()
