"""Checkpoints in a real vLLM on the CPU, held to transformers' forward pass of the same files: `make test-vllm`.

vLLM wants other releases of torch and transformers than we do, so it lives in an environment of its own, whose Python
BITWRIGHT_TEST_VLLM names, and answers in JSON. What it loads, and what it refuses, is what the table of formats says.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.formats import VLLM_CPU, ExportFormat
from app.domain.methods import Scheme
from tests.engine.conftest import run_job
from tests.engine.model.loading import base_of, loader, logits
from tests.tiny_model import tiny_model_folder
from workers.formats.cards.vllm import vllm_refusals, vllm_rows

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CLOSE = 0.12
"""Largest difference of a log-probability: both compute in bfloat16, each with roundings of its own."""

ROUNDED = {"int8": (0.1, 0.0004), "fp8": (0.3, 0.0015), "4 bits and fp8": (0.3, 0.0004), "cache in fp8": (0.3, 0.0015)}
"""Both limits where inputs or keys and values are rounded, too: what falls the other way moves all that comes after."""

DIVERGENCE = 0.0002
"""Largest mean KL divergence, nats per token: a tenth of what quantization makes of this model, or less."""

NEARLY_LOSSLESS = ("int8", "fp8")
"""Schemes whose change of this model is no more than two forward passes differ; wrong scales make far more."""

TEXT = "The `with` statement is used to wrap the execution of a block with methods defined by a context manager."
TOKENS = 12
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",  # or it wants a C++ compiler, and half a minute for what runs once
    "OMP_NUM_THREADS": "2",
}


@dataclass(frozen=True)
class Answer:
    """vLLM's answer: log-probabilities (positions, vocabulary) and the tokens that it wrote, or its refusal."""

    version: str
    error: str
    logprobs: Tensor
    written: list[int]


def in_vllm(folder: Path, adapter: Path | None, prompt: list[int], scratch: Path) -> Answer:
    """vLLM's answer, from a process of its own."""
    python = os.environ.get("BITWRIGHT_TEST_VLLM")
    if python is None:
        pytest.fail("BITWRIGHT_TEST_VLLM names no Python with vLLM; `make test-vllm` makes one")
    case = {"model": str(folder), "adapter": adapter and str(adapter), "rank": 8, "prompt": prompt, "tokens": TOKENS}
    file = scratch / "case.json"
    file.write_text(json.dumps(case))
    environment = {"PATH": os.environ["PATH"], "HOME": str(scratch), **SETTINGS}
    command = [python, str(Path(__file__).with_name("in_vllm.py")), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    found = torch.tensor(told.get("logprobs", []))
    return Answer(told["version"], told.get("error", ""), found, told.get("written", []))


def quantize(workspace: Path, **request: Any) -> dict[str, Path]:
    """A whole job on the tiny trained model: its checkpoints by format."""
    result = run_job(tiny_model_folder(), workspace, **request)
    return {name: workspace / path for name, path in result.checkpoints.items()}


def prompt_of(model: Path) -> list[int]:
    ids = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    assert isinstance(ids, list)
    return ids


def assert_same_model(answer: Answer, model: Any, name: str, prompt: list[int]) -> None:
    """vLLM's distributions and tokens are those of `model`, and not those of the model before quantization."""
    assert (answer.version, answer.error) == (VLLM_CPU, "")
    ours = distributions(model, prompt)
    original = distributions(AutoModelForCausalLM.from_pretrained(tiny_model_folder()), prompt)
    difference, divergence = float((answer.logprobs - ours).abs().max()), kl(ours, answer.logprobs)
    likeliest = float((answer.logprobs.argmax(-1) == ours.argmax(-1)).float().mean())
    figures = f"{difference:.4f} | {divergence:.6f} | {100 * likeliest:.1f} % | {kl(ours, original):.4f}"
    sys.stdout.write(f"\n| {name} | {len(ours)} | {figures} |\n")
    close, diverging = ROUNDED.get(name, (CLOSE, DIVERGENCE))
    assert difference < close
    assert divergence < diverging
    if name not in NEARLY_LOSSLESS:
        assert kl(ours, original) > 10 * DIVERGENCE, "or the comparison could not fail"
    assert_written(answer.written, model, prompt, close)


def kl(first: Tensor, second: Tensor) -> float:
    """Mean divergence of two sets of log-probabilities, nats per token."""
    return float((first.exp() * (first - second)).sum(-1).mean())


def assert_written(written: list[int], model: Any, prompt: list[int], close: float) -> None:
    """Each token is one that the model, given those before it, holds likeliest, within the rounding of the two."""
    assert len(written) == TOKENS
    rows = distributions(model, prompt + written)[len(prompt) - 1 :]
    for row, token in zip(rows, written, strict=True):
        assert float(row.max() - row[token]) < close


def distributions(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token, after each of `ids` but the last."""
    found = logits(model.eval(), torch.tensor([ids]))[0, :-1].float()
    return torch.log_softmax(found, dim=-1)


LOADED: dict[str, dict[str, Any]] = {
    "symmetric": {"group_size": 64},
    "asymmetric": {"group_size": 32, "symmetric": False},
    "per channel": {"group_size": -1},
    "per channel, asymmetric": {"group_size": -1, "symmetric": False},
    "linears left at 16 bits": {
        "modules": {"ignore": ["lm_head", "*.mlp.gate_proj", "*.mlp.up_proj", "*.1.self_attn.*"]}
    },
    "mixed groups": {"group_size": 64, "modules": {"overrides": {"*.down_proj": {"group_size": 8}}}},
    "with the head": {"modules": {"ignore": []}},
    "merged": {"formats": ["merged"]},
    "gptq": {"group_size": 64, "formats": ["gptq"]},
    "gptq, per channel, linears left at 16 bits": {
        "group_size": -1,
        "formats": ["gptq"],
        "modules": {"ignore": ["lm_head", "*.mlp.gate_proj", "*.mlp.up_proj", "*.1.self_attn.*"]},
    },
    "gptq, mixed groups": {
        "group_size": 64,
        "formats": ["gptq"],
        "modules": {"overrides": {"*.down_proj": {"group_size": 32}, "*.[qkv]_proj": {"group_size": 32}}},
    },
    "awq": {"group_size": 64, "formats": ["awq"]},
    "awq, asymmetric, linears left at 16 bits": {
        "group_size": 32,
        "symmetric": False,
        "formats": ["awq"],
        "modules": {"ignore": ["lm_head", "*.mlp.gate_proj", "*.mlp.up_proj", "*.1.self_attn.*"]},
    },
    "int8": {"scheme": "int8"},
    "fp8": {"scheme": "fp8"},
    "4 bits and fp8": {"group_size": 64, "modules": {"overrides": {"*.down_proj": {"scheme": "fp8"}}}},
    "cache in fp8": {"group_size": 64, "kv_cache": "fp8"},
}


@pytest.mark.parametrize("name", LOADED)
def test_vllm_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    folders = quantize(tmp_path, **LOADED[name])
    native = folders.pop("native")
    (folder,) = folders.values()
    prompt = prompt_of(folder)
    answer = in_vllm(folder, None, prompt, tmp_path)
    # Stock transformers reads GPTQ and AWQ by packages that are not here: the same job's native checkpoint stands for
    # them.
    stock = folder.name not in ("gptq", "awq")
    model = AutoModelForCausalLM.from_pretrained(folder) if stock else loader(native).load(native)
    assert_same_model(answer, model, name, prompt)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("base", ["compressed-tensors", "merged"])
def test_vllm_adds_the_adapter_that_peft_adds(tmp_path: Path, base: str) -> None:
    from peft import PeftModel

    spec = {"method": "loftq", "bits": 4, "rank": 8, **({"base": "affine"} if base == "compressed-tensors" else {})}
    folders = quantize(tmp_path, **spec, formats=[base, "peft"])
    prompt = prompt_of(folders[base])
    answer = in_vllm(folders[base], folders["peft"], prompt, tmp_path)
    alone = base_of(folders[base])
    without = distributions(alone, prompt)
    both = PeftModel.from_pretrained(alone, str(folders["peft"]))
    assert_same_model(answer, both, f"LoRA of rank 8 on {base}", prompt)
    assert kl(distributions(both, prompt), without) > 10 * DIVERGENCE, "or the adapter could be missing"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": ({"bits": 3}, "Failed to find a kernel that can implement the WNA16 linear layer"),
    "2 bits, asymmetric": ({"bits": 2, "symmetric": False}, "Failed to find a kernel that can implement the WNA16"),
    "8 bits": ({"bits": 8}, "Failed to find a kernel that can implement the WNA16 linear layer"),
    "q apart from k and v": (
        {"modules": {"ignore": ["lm_head", "*.q_proj"]}},
        "Found different quantization schemes for the shards",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_in_its_own_words_what_the_table_says_that_it_refuses(tmp_path: Path, name: str) -> None:
    request, words = REFUSED[name]
    folder = quantize(tmp_path, **request)["compressed-tensors"]
    answer = in_vllm(folder, None, [1, 2, 3], tmp_path)
    sys.stdout.write(f"\n{name}: {answer.error}\n")
    assert words in " ".join(answer.error.split())
    schemes = {
        f"model.layers.{one['block']}.{one['name']}": Scheme(**{k: one[k] for k in ("bits", "group_size", "symmetric")})
        for one in linears_of(folder)
    }
    on_cpu = next(row for row in vllm_rows(ExportFormat.COMPRESSED_TENSORS) if row.version == VLLM_CPU)
    assert vllm_refusals(schemes, on_cpu)


def linears_of(folder: Path) -> list[dict[str, Any]]:
    """Every quantized linear, as the report beside the files has it."""
    blocks = json.loads((folder / "report.json").read_text())["blocks"]
    return [{**linear, "block": block["index"]} for block in blocks for linear in block["linears"]]
