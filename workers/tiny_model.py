"""A tiny language model, trained on the spot: for tests, and for a demo on a machine without a model or a network.

    python -m workers.tiny_model FOLDER

Trains a Llama of two blocks on the reference text that comes with Python (`pydoc_data.topics`), some ten seconds on one
thread with a fixed seed, and writes a Hugging Face checkpoint to FOLDER. A FOLDER that has one already is left alone.
What it learns is enough for quantization to show: its weights have structure and its perplexity is far below chance.
"""

import hashlib
import os
import pydoc_data.topics
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THREADS = 1
"""The matrices are small: on a busy machine threads would wait for each other longer than they compute."""
START, END = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Shape and training of the model; the defaults take about ten seconds."""

    vocabulary: int = 512
    width: int = 128
    intermediate: int = 384
    blocks: int = 2
    heads: int = 4
    key_value_heads: int = 2
    positions: int = 2048
    steps: int = 200
    batch: int = 8
    length: int = 64
    learning_rate: float = 6e-3
    seed: int = 20_240_101


def main() -> None:
    """The command line: one argument, the folder."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(f"{make_tiny_model(Path(sys.argv[1]))}\n")


def content_key() -> str:
    """Changes whenever the model that would be trained changes: with this file, the text or torch."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + training_text().encode() + torch.__version__.encode())
    return digest.hexdigest()[:16]


def make_tiny_model(folder: Path, recipe: Recipe | None = None) -> Path:
    """The folder, with the trained checkpoint in it; written beside it and renamed, so it is whole or not there."""
    if (folder / "model.safetensors").is_file():
        return folder
    staging = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        _write(staging, recipe or Recipe())
    finally:
        torch.set_num_threads(threads)
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)
        if not (folder / "model.safetensors").is_file():
            raise
    return folder


def training_text() -> str:
    """All topics of Python's own reference text."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _write(folder: Path, recipe: Recipe) -> None:
    text = training_text()
    tokenizer = train_tokenizer(text, recipe)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    model = train(ids, recipe)
    model.generation_config.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(text: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text has tokens, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        model_max_length=recipe.positions,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train(ids: Tensor, recipe: Recipe) -> LlamaForCausalLM:
    """The model after `recipe.steps` steps of AdamW in fp32, with warm-up and cosine decay."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(_config(recipe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps, pct_start=0.1)
    started = time.monotonic()
    for step, batch in zip(range(1, recipe.steps + 1), _batches(ids, recipe), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            sys.stdout.write(f"training step {step} of {recipe.steps}, loss {loss.item():.2f}, {seconds:.0f} s\n")
            sys.stdout.flush()
    return model.eval()


def _batches(ids: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        starts = torch.randint(len(ids) - recipe.length, (recipe.batch,), generator=generator)
        yield torch.stack([ids[start : start + recipe.length] for start in starts.tolist()])


def _config(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=False,
        # The usual 0.02 is for wide models: so narrow a one learns nothing for its first hundred steps.
        initializer_range=recipe.width**-0.5,
        bos_token_id=0,
        eos_token_id=1,
    )


if __name__ == "__main__":
    main()
