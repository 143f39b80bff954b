"""A small Llama of which every row is whole super-blocks, trained here in bf16 on a text that a file gives.

No small published checkpoint has such rows, and weights that were never trained say nothing of rounding.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workers.tiny_model import Recipe, train_tokenizer

WIDTH, INTERMEDIATE, HEADS, KEY_VALUE_HEADS = 256, 768, 4, 2


def write_trained(
    folder: Path, text: str, *, device: str, seed: int, steps: int, blocks: int, batch: int, vocabulary: int = 4096
) -> float:
    """Writes a checkpoint with its tokenizer; the loss of the last steps in nats a token.

    The matrix of embeddings is the head's. Weights are fp32 while they are trained, products bf16.
    """
    recipe = Recipe(vocabulary=vocabulary, width=WIDTH, positions=2048, length=256, batch=batch, steps=steps, seed=seed)
    tokenizer, ids = _tokens(text, vocabulary, recipe.positions)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(device)
    loss = _trained(model, ids, recipe, device)
    model.generation_config.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


@cache
def _tokens(text: str, vocabulary: int, positions: int) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """A tokenizer of a text, the same for every seed, and the text's tokens, int64 (tokens,).

    Paragraphs are read by themselves: the library takes those of a list on all processors.
    """
    tokenizer = train_tokenizer(text, Recipe(vocabulary=vocabulary, width=WIDTH, positions=positions))
    paragraphs = [f"{paragraph}\n\n" for paragraph in text.split("\n\n")]
    read = tokenizer(paragraphs, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer, torch.tensor([token for ids in read for token in ids])


def _trained(model: LlamaForCausalLM, ids: Tensor, recipe: Recipe, device: str) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, recipe.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets, recent = torch.arange(recipe.length, device=device), list[Tensor]()
    ids = ids.to(device)
    for _ in range(recipe.steps):
        starts = torch.randint(len(ids) - recipe.length, (recipe.batch,), generator=generator).to(device)
        batch = ids[starts[:, None] + offsets]
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.detach()]
    model.eval()
    return float(torch.stack(recent).mean())
