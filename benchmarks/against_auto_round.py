"""SignRound here against auto-round: same model, calibration text, sequences and GPU, measured by the same code.

    python -m benchmarks.against_auto_round MODEL --calibration calibration.jsonl --valid valid.jsonl \
        --schemes W4g64 W3g64a W2g64a --presets default light --seeds 0 1 2 --auto-round --output results.jsonl

One JSON line per run: seconds, perplexity and KL(original || quantized) per token on sequences of 1024 tokens. Our
seconds are those of the report without loading, evaluation and export; auto-round's are those of its `quantize()`, with
model and tokenizer loaded already. The first run of the process is cold: its kernels are compiled in it.
`--auto-round enable_alg_ext=True iters=1000` gives the peer settings of its own, of which each run has one set.
A preset brings its own number and length of sequences; `recipe` is auto-round's own (200 steps from full ranges, 128
sequences of 2048 tokens), `quick` is `light` and 250 steps end to end on more text; `--length` overrides all.
auto-round needs the packages auto-round and datasets.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from app.domain.methods import Scheme
from app.domain.request.job_request import JobRequest
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.formats.load_bitwright import load

SAMPLES, LENGTH = 128, 2048
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "recipe": ("default", {"scale_search": False}, {}),
    "quick": ("light", {"scale_steps": 250}, {"num_samples": 384, "further_samples": 512}),
}
"""Names beside those of presets: a preset, and what is asked for otherwise of the method and of the text."""
EVALUATION_LENGTH = 1024


def parse_scheme(text: str) -> Scheme:
    """ "W3g64a": 3 bits, groups of 64, asymmetric."""
    match = re.fullmatch(r"W(\d)g(-?\d+)(a?)", text)
    if match is None:
        raise SystemExit(f"{text!r} is not like W4g64 or W3g64a")
    return Scheme(bits=int(match[1]), group_size=int(match[2]), symmetric=not match[3])


def read_rows(path: str) -> list[str]:
    """Texts of a file of JSON lines, which may hold U+2028 as it is: `str.splitlines` would end a line there."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def read_text(path: str) -> str:
    return "\n\n".join(read_rows(path))


def beginning(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer begins a text with, int64 (tokens,)."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    return torch.tensor(whole[: whole.index(plain[0])], dtype=torch.int64)


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """Sequences of a text, (sequences, 1, length), each behind what the tokenizer begins a text with.

    Gemma's and others' say nothing without the token of the beginning.
    """
    begin = beginning(tokenizer)
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    each = length - len(begin)
    rows = ids[: len(ids) // each * each].view(-1, each)
    return torch.cat([begin.expand(len(rows), -1), rows], dim=1)[:, None]


def in_half(model: Any, device: torch.device) -> Any:
    """A model of transformers with its weights in bf16.

    Buffers stay: frequencies of rotary embeddings in bf16 turn every position by another angle than any runtime does.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device)


class QualityMeter:
    """Perplexity and KL to the original over the first sequences of a text."""

    def __init__(self, model: str, text: str, sequences: int, device: str, length: int = EVALUATION_LENGTH) -> None:
        self._sequences = windows(AutoTokenizer.from_pretrained(model), text, length)[:sequences].to(device)
        self._kept: list[Tensor] = []
        self._original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)

    @torch.inference_mode()
    def __call__(self, model: Any, keep: bool = False) -> dict[str, float]:
        """The judgement of a model; keep: the original's logits stay where they are, for the next ones."""
        model = in_half(model, self._sequences.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self._sequences.device)
        for place, sequence in enumerate(self._sequences):
            by_original = self._kept[place] if place < len(self._kept) else self._original(sequence).logits
            if keep and place == len(self._kept):
                self._kept.append(by_original)
            ours, theirs = (each[0, :-1].float().log_softmax(-1) for each in (model(sequence).logits, by_original))
            target = sequence[0, 1:, None]
            kl = (theirs.exp() * (theirs - ours)).sum()
            sums += torch.stack([-ours.gather(1, target).sum(), -theirs.gather(1, target).sum(), kl]).double()
        nll, nll_original, kl = (sums / (len(self._sequences) * (self._sequences.shape[-1] - 1))).tolist()
        return {"perplexity": math.exp(nll), "perplexity_original": math.exp(nll_original), "kl": kl}


def ours(given: argparse.Namespace, scheme: Scheme, preset: str, seed: int, meter: QualityMeter) -> dict[str, Any]:
    of_preset, asked, calibration = ARMS.get(preset, (preset, {}, {}))
    quantization = {"method": "signround", "preset": of_preset, **asked} | scheme.model_dump(exclude={"name"})
    model, text = (str(Path(path).resolve()) for path in (given.model, given.calibration))
    body = {
        "model": model,
        "quantization": quantization,
        "calibration": {"dataset": {"source": "local", "path": text}, **calibration}
        | ({} if given.length is None else {"sequence_length": given.length}),
        "evaluation": None,
        "formats": ["native"],
        "seed": seed,
    }
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=model,
        calibration_path=text,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    events: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = run(order, Path(folder), Reporter(events.append)).report
        wall = time.perf_counter() - start
        quality = meter(load(Path(folder) / "output" / "native"))
    falls = sorted({e.event for e in events if e.type == "log"})
    texts = report.calibration
    tokens = None if texts is None else [texts.num_samples, texts.sequence_length]
    seconds = {name: round(value, 3) for name, value in report.seconds.items()}
    working = sum(value for name, value in seconds.items() if name not in {"load", "evaluate", "export", "total"})
    peak = report.peak_memory.device_bytes
    return (
        {"wall": round(wall, 2), "seconds": round(working, 2), "stages": seconds, "log": falls, "calibration": tokens}
        | quality
        | {"peak_gib": None if peak is None else round(peak / 2**30, 2)}
    )


def peer_settings(texts: list[str]) -> dict[str, Any]:
    """auto-round's own arguments, like `iters=1000` and `enable_alg_ext=True`."""
    pairs = (text.split("=") for text in texts)
    return {name: value == "True" if value in ("True", "False") else int(value) for name, value in pairs}


def peer(model: str, calibration: str, seed: int, meter: QualityMeter, **asked: Any) -> dict[str, Any]:
    """auto-round's own 200 steps with what is `asked` of it (bits, group_size, sym; or a scheme of its own by name)."""
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(read_text(calibration))["input_ids"]
    chosen = random.Random(seed)
    starts = [chosen.randrange(0, len(ids) - LENGTH - 64) for _ in range(SAMPLES)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        # A little more than needed: tokenizing the text again may shorten it.
        file.writelines(json.dumps({"text": tokenizer.decode(ids[s : s + LENGTH + 32])}) + "\n" for s in starts)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    recipe = {"iters": 200, "nsamples": SAMPLES, "seqlen": LENGTH, "batch_size": 8, "dataset": file.name, "seed": seed}
    start = time.perf_counter()
    quantized, _ = AutoRound(original, tokenizer, **recipe | asked).quantize()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2)} | meter(quantized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--schemes", nargs="+", default=["W4g64", "W3g64a", "W2g64a"])
    parser.add_argument("--presets", nargs="*", default=["recipe", "default", "light"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--auto-round", nargs="*", help="run the peer, too, with the first seed; NAME=VALUE: its own settings"
    )
    parser.add_argument("--length", type=int, help="tokens of a calibration sequence, for ours")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    meter = QualityMeter(
        given.model, read_text(given.valid), given.sequences, "cuda" if torch.cuda.is_available() else "cpu"
    )
    with given.output.open("a") as output:
        for text in given.schemes:
            scheme = parse_scheme(text)
            runs = [(preset, seed) for preset in given.presets for seed in given.seeds]
            for preset, seed in runs:
                write(
                    output,
                    {"by": "bitwright", "scheme": text, "preset": preset, "seed": seed}
                    | ours(given, scheme, preset, seed, meter),
                )
            if given.auto_round is not None:
                write(
                    output,
                    {"by": "auto-round", "scheme": text, "seed": given.seeds[0], "settings": given.auto_round}
                    | peer(
                        given.model,
                        given.calibration,
                        given.seeds[0],
                        meter,
                        bits=scheme.bits,
                        group_size=scheme.group_size,
                        sym=scheme.symmetric,
                        **peer_settings(given.auto_round),
                    ),
                )


def write(output: Any, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    output.write(json.dumps(line) + "\n")
    output.flush()


if __name__ == "__main__":
    main()
