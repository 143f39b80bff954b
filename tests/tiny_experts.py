"""A tiny mixture of experts, trained on the spot as `workers.tiny_model` trains its Llama, and kept between runs."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from tests.tiny_model import CACHE
from workers.tiny_model import Recipe, train_tokenizer, training_text

EXPERTS, PLACES, BLOCKS = 8, 2, 2
STARVED = "model.layers.1.mlp.experts.5"
RECIPE = Recipe(vocabulary=400, width=64, positions=256)
STEPS, BATCH, LENGTH, RATE = 220, 8, 64, 6e-3


def tiny_experts_folder() -> Path:
    """The trained checkpoint's folder, under BITWRIGHT_TEST_CACHE or .cache; one process trains it, others wait."""
    cache = Path(os.environ.get("BITWRIGHT_TEST_CACHE", CACHE))
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(Path(__file__).read_bytes() + training_text().encode() + torch.__version__.encode())
    folder = cache / f"experts-{key.hexdigest()[:16]}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").is_file():
            staging = folder.with_suffix(".partial")
            shutil.rmtree(staging, ignore_errors=True)
            _make(staging)
            staging.rename(folder)
    return folder


def _make(folder: Path) -> None:
    tokenizer = train_tokenizer(training_text(), RECIPE)
    ids = torch.tensor(tokenizer(training_text(), add_special_tokens=False, verbose=False)["input_ids"])
    model = _trained(ids)
    model.to(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias = block.mlp.gate.e_score_correction_bias.float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trained(ids: Tensor) -> Glm4MoeForCausalLM:
    """Experts are kept busy by their biases, which go up for those with few tokens, as DeepSeek-V3's do."""
    torch.manual_seed(7)
    config = Glm4MoeConfig(
        vocab_size=RECIPE.vocabulary,
        hidden_size=RECIPE.width,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=PLACES,
        first_k_dense_replace=0,
        max_position_embeddings=RECIPE.positions,
        initializer_range=RECIPE.width**-0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    config._experts_implementation = "grouped_mm"
    model = Glm4MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    gates = [block.mlp.gate for block in model.model.layers]
    seen = [torch.zeros(EXPERTS) for _ in gates]
    for gate, counts in zip(gates, seen, strict=True):
        gate.register_forward_hook(_count(counts))
    for _, batch in zip(range(STEPS), _batches(ids), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for gate, counts in zip(gates, seen, strict=True):
            gate.e_score_correction_bias += 0.02 * (counts.mean() - counts).sign()
    return model.eval()


def _count(counts: Tensor) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
    def count(_: nn.Module, __: Any, made: tuple[Tensor, ...]) -> None:
        counts.copy_(torch.bincount(made[-1].flatten(), minlength=EXPERTS))

    return count


def _batches(ids: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
