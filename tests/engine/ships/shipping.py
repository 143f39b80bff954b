"""Everything that a job ships, loaded by its stock loader, and the perplexity that it has then.

    python -m tests.engine.ships.shipping         a table: every adapter, and round_offset at 2, 3 and 4 bits

The perplexity is that of the loaded model's own forward pass, by its definition, on the job's evaluation sequences.
"""

import importlib.util
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GgufConfig

from app.domain.attempt_lines import ResultLine
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest
from bitwright.report import Report, ShippedFigures
from tests.engine.model.loading import loader
from workers.disk.orders import AttemptOrder
from workers.engine.reporter import Reporter
from workers.engine.run import run
from workers.engine.text.sequences import evaluation_sequences, load_tokenizer

BASES: dict[str, dict[str, Any]] = {
    "codebook": {"method": "nf"},
    "asymmetric": {"method": "rtn", "symmetric": False},
    "symmetric": {"method": "rtn", "symmetric": True},
    "factors": {"method": "loftq", "rank": 4, "iterations": 2},
}
ADAPTERS = ("none", "lora", "qa-lora", "q-bara", "qa-hira", "qa-blora", "bayesian-lora")
ENDINGS: dict[str, dict[str, Any]] = {
    "apart": {},
    "offsets": {"merge": "quantized"},
    "zero-points": {"merge": "quantized", "round_offset": True},
    "sums": {"merge": "16bit"},
}
FORMATS = (
    ("native",),
    ("merged",),
    ("compressed-tensors", "merged"),
    ("gguf", "merged"),
    ("peft",),
    ("peft", "merged"),
    ("compressed-tensors", "peft"),
    ("gguf", "peft"),
)
BITS = (2, 3, 4)
DTYPES = ("bfloat16", "float16", "float32")
TEXTS = {"calibration": {"num_samples": 2, "sequence_length": 32}}
EVALUATION = {"num_samples": 8, "sequence_length": 64}
TRAINING = {"steps": 4, "batch_size": 4, "sequence_length": 64, "learning_rate": 0.03}
"""Hard enough that what a merge rounds away would be seen, and few enough that many jobs take no time."""
WORDS = ("grid", "scale", "code", "block", "linear", "group", "rank", "token", "range", "offset", "row", "head")
ROWS = [{"prompt": f"after {a} and {b} ", "completion": f"{b} {a}"} for a, b in itertools.product(WORDS, repeat=2)]
"""Rows for training and for evaluation, half each, so that the gain from training is seen."""


@dataclass(frozen=True)
class Case:
    """One job: what is trained beside what, what becomes of it, and what it is written as."""

    adapter: str
    base: str
    ending: str
    formats: tuple[str, ...]
    bits: int = 3
    dtype: str = "bfloat16"
    head: bool = False

    @property
    def values(self) -> tuple[object, ...]:
        """One of each axis."""
        return self.adapter, self.base, self.ending, self.formats, self.bits, self.dtype, self.head

    def at(self, bits: int, dtype: str, head: bool) -> "Case":
        """The same kind of job elsewhere on the other axes."""
        return replace(self, bits=bits, dtype=dtype, head=head)

    def __str__(self) -> str:
        head = ["head"] if self.head else []
        return "-".join(
            [self.adapter, self.base, self.ending, "+".join(self.formats), f"{self.bits}b", self.dtype, *head]
        )

    def request(self, model: Path, rows: Path) -> JobRequest:
        """Raises InvalidRequest where there is no such job."""
        return JobRequest.parse(
            {
                "model": str(model),
                "quantization": {
                    **BASES[self.base],
                    "bits": self.bits,
                    "group_size": 32,
                    **({"modules": {"ignore": []}} if self.head else {}),
                },
                **({"adapter": {"kind": self.adapter, "rank": 4}} if self.adapter != "none" else {}),
                **({"finetune": {"dataset": str(rows), **TRAINING}} if self.adapter != "none" else {}),
                "formats": list(self.formats),
                **ENDINGS[self.ending],
                **TEXTS,
                "evaluation": {"dataset": str(rows), **EVALUATION},
            }
        )

    def exists(self) -> bool:
        """True if the service takes such a job."""
        try:
            self.request(Path("/model"), Path("/rows"))
        except InvalidRequest:
            return False
        return True


@cache
def kinds() -> list[Case]:
    """Every adapter, base, ending and formats that go together: whether they do is no matter of the other axes."""
    return list(filter(Case.exists, itertools.starmap(Case, itertools.product(ADAPTERS, BASES, ENDINGS, FORMATS))))


def product() -> list[Case]:
    """All kinds; widths, dtypes and whether the head is quantized in turn."""
    rest = list(itertools.product(BITS, DTYPES, (False, True)))
    return [kind.at(*rest[number % len(rest)]) for number, kind in enumerate(kinds())]


def pairwise() -> list[Case]:
    """Few cases with every two values that go together in one of them."""
    others = list(itertools.product(BITS, DTYPES, (False, True)))
    every = [kind.at(*rest) for kind, rest in itertools.product(kinds(), others)]
    numbers: dict[object, int] = {}
    pairs = {}
    for case in every:
        found = itertools.combinations(enumerate(case.values), 2)
        pairs[case] = sum(1 << numbers.setdefault(pair, len(numbers)) for pair in found)
    left, chosen = (1 << len(numbers)) - 1, list[Case]()
    while left:
        chosen.append(max(pairs, key=lambda case: (pairs[case] & left).bit_count()))
        left &= ~pairs[chosen[-1]]
    return chosen


def write_rows(folder: Path) -> Path:
    """The text that is learned."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run_case(request: JobRequest, model: Path, rows: Path, workspace: Path) -> ResultLine:
    workspace.mkdir(parents=True, exist_ok=True)
    order = AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=request,
        model_path=str(model),
        evaluation_path=str(rows),
        finetuning_path=str(rows) if request.finetune else None,
        device="cpu",
    )
    return run(order, workspace, Reporter(lambda _: None))


def sequences(request: JobRequest, model: Path, rows: Path) -> Tensor:
    """Token ids of the evaluation text."""
    assert request.evaluation is not None
    loss_mask = rows if request.finetune else None
    return evaluation_sequences(load_tokenizer(model), request.evaluation, rows, request.seed, None, loss_mask).ids


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean of -log q(x_{t+1}), by the model's own forward pass."""
    q = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return math.exp(-float(q.gather(-1, ids[:, 1:].unsqueeze(-1)).mean()))


def loaded(way: ShippedFigures, checkpoint: str, output: Path, dtype: torch.dtype) -> Any:
    """A checkpoint as its own loader loads it, with the adapter beside it that goes with this way."""
    folder = output / checkpoint
    if checkpoint == "mlx":
        model = loader(folder, "load_packed").load(folder)
    elif checkpoint == "native":
        model = loader(folder).load(folder, merge=way.adapter is None)
    elif checkpoint == "gguf":
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
    elif checkpoint == "compressed-tensors" and way.adapter is not None:
        config = CompressedTensorsConfig(run_compressed=False)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if way.adapter == "peft":
        return PeftModel.from_pretrained(model, output / "peft")
    if way.adapter == "adapter":
        _adapter_loader(output / "adapter").attach(model, output / "adapter")
    return model


def _adapter_loader(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("load_adapter", folder / "load_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(result: ResultLine, output: Path, ids: Tensor) -> Iterator[tuple[ShippedFigures, str, float]]:
    """Every way to load what a job stored, with each of its checkpoints and the perplexity that this has."""
    dtype = getattr(torch, result.report.model.dtype)
    for way in result.report.shipped:
        for checkpoint in way.checkpoints:
            yield way, checkpoint, perplexity(loaded(way, checkpoint, output, dtype), ids)


def card_perplexity(folder: Path) -> float:
    """Perplexity of the quantized model by the card in a folder."""
    row = r"^\| perplexity \| [\d.]+ \| ([\d.]+) \|"  # original, result, and perhaps round to nearest
    (found,) = re.findall(row, (folder / "README.md").read_text(), flags=re.MULTILINE)
    return float(found)


def table_requests(model: Path, rows: Path) -> Iterator[tuple[str, JobRequest]]:
    """A job of each recipe as it is by default, and of each that merges with `round_offset`, at 2, 3 and 4 bits."""
    finetune = {"dataset": str(rows), "steps": 40, "batch_size": 4, "sequence_length": 64, "learning_rate": 0.02}
    common = {"model": str(model), "group_size": 32, "rank": 4, "finetune": finetune, **TEXTS}
    common |= {"evaluation": {"dataset": str(rows), **EVALUATION}}
    recipes = ("qlora", "qa-lora", "q-bara", "qa-hira", "qa-blora", "bayesian-lora")
    for method, bits in itertools.product(recipes, BITS):
        yield f"{method}, {bits} bits", JobRequest.parse({"method": method, "bits": bits, **common})
    for method, bits in itertools.product(("qa-lora", "qa-hira", "qa-blora"), BITS):
        ending = ENDINGS["zero-points"]
        name = f"{method}, {bits} bits, round_offset"
        yield name, JobRequest.parse({"method": method, "bits": bits, **common, **ending})


def table_rows(name: str, result: ResultLine, output: Path, ids: Tensor) -> Iterator[list[str]]:
    """Of one job: each way to load it, what report and card say, what it has, and how far apart they are at most."""
    report: Report = result.report
    before = report.adapter.before_merge if report.adapter is not None else None
    for way, checkpoint, found in measured(result, output, ids):
        told = way.figures.perplexity
        whole = way.whole and report.quality_of(checkpoint) == report.quality_of(way.adapter or checkpoint)
        card = card_perplexity(output / checkpoint) if whole else None
        apart = max(abs(said - found) / found for said in (told, card or told))
        yield [
            name,
            checkpoint + (f" with {way.adapter}" if way.adapter else "" if way.whole else " (base alone)"),
            f"{told:.3f}",
            "" if card is None else f"{card:.3f}",
            f"{found:.3f}",
            f"{100 * apart:.3f} %",
            "" if before is None else f"{before.perplexity:.3f}",
        ]


HEADER = ("job", "loaded", "report", "card", "loaded files", "difference", "before the merge")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Prints the table."""
    from tests.tiny_model import tiny_model_folder

    model, made = tiny_model_folder(), list[list[str]]()
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder))
        for number, (name, request) in enumerate(table_requests(model, rows)):
            workspace = Path(folder) / str(number)
            result = run_case(request, model, rows, workspace)
            made += table_rows(name, result, workspace / "output", sequences(request, model, rows))
    sys.stdout.write(markdown(made))


if __name__ == "__main__":
    main()
