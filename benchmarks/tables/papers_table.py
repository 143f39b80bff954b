"""The tables of docs/papers.md: per paper, the request that reproduces its row and the measured figure."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from benchmarks.tables.cells import Cell, cells
from benchmarks.tables.finetuning_cells import finetuning_cells
from benchmarks.tables.results_table import Line, lines, spread, table

TITLES = MappingProxyType(
    {
        "2210.17323": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "2306.00978": "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "2308.13137": "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
        "2309.05516": "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        "2310.08659": "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
        "2402.05147": "ApiQ: Finetuning of 2-Bit Quantized Large Language Model",
        "2311.12023": "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
        "2305.14314": "QLoRA: Efficient Finetuning of Quantized LLMs",
        "2309.14717": "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models",
        "2407.17029": "Q-BaRA and QA-HiRA (in its second version Q-BLoRA and QA-BLoRA)",
        "2406.13046": "Bayesian-LoRA",
    }
)
"""arXiv number -> title, or what the paper proposes."""

QUANTIZATION = MappingProxyType(
    {
        "gptq": "2210.17323",
        "awq": "2306.00978",
        "omniquant": "2308.13137",
        "signround": "2309.05516",
        "loftq nf": "2310.08659",
        "loftq": "2310.08659",
        "apiq layer": "2402.05147",
        "apiq block": "2402.05147",
        "apiq block, 2560 steps": "2402.05147",
        "lq-lora fisher": "2311.12023",
        "lq-lora": "2311.12023",
    }
)
FINETUNING = MappingProxyType(
    {
        "qlora": "2305.14314",
        "qa-lora": "2309.14717",
        "q-bara": "2407.17029",
        "qa-hira": "2407.17029",
        "bayesian-lora": "2406.13046",
        "bayesian-lora closing gates": "2406.13046",
        "lora from apiq": "2402.05147",
    }
)
"""Row of the results -> its paper."""


def papers() -> str:
    """KL divergence of every row that a paper proposes, with the request's `quantization`."""
    by_arm, rows = _by_arm(cells()), []
    for arm, number in QUANTIZATION.items():
        row = by_arm[arm]
        varying = {"bits"} if len({cell.quantization.get("symmetric") for cell in row}) == 1 else {"bits", "symmetric"}
        fixed = {name: value for name, value in row[0].quantization.items() if name not in varying}
        rows.append([_paper(number), _json(fixed), _figures(row, lambda line: line["kl"])])
    return table(("paper", "`quantization`, but for `bits`", "our KL divergence"), rows)


def finetuning_papers() -> str:
    """Held-out loss of every adapter, with the fields of the request that other rows do not share."""
    rows = []
    for arm, row in _by_arm(finetuning_cells()).items():
        name = arm.rpartition(", rank ")[0]
        training = row[0].training or {}
        request = {**training, "finetune": {"learning_rate": training["finetune"]["learning_rate"]}}
        if name == "lora from apiq":
            base = row[0].quantization
            request = {"quantization": {field: base[field] for field in base if field != "bits"}, **request}
        rows.append([_paper(FINETUNING[name]), _json(request), _figures(row, lambda line: line["held_out"])])
    return table(("paper", "the request's own fields", "our loss"), rows)


def _by_arm(wanted: Iterator[Cell]) -> dict[str, list[Cell]]:
    rows: dict[str, list[Cell]] = {}
    for cell in wanted:
        rows.setdefault(cell.arm, []).append(cell)
    return rows


def _figures(row: Sequence[Cell], figure: Callable[[Line], float]) -> str:
    """A figure per width, the mean of its seeds."""
    measured = {line["key"]: line for line in lines()}
    texts = []
    for bits in sorted({cell.bits for cell in row}, reverse=True):
        values = [figure(measured[cell.key]) for cell in row if cell.bits == bits and cell.key in measured]
        shown = f"{fmean(values):.4f}{spread(values)}" if values else "missing"
        texts.append(f"{bits:g} bits: {shown}")
    return "; ".join(texts)


def _paper(number: str) -> str:
    return f"{TITLES[number]}, [arXiv:{number}](https://arxiv.org/abs/{number})"


def _json(value: Mapping[str, Any]) -> str:
    return f"`{json.dumps(value)}`"
