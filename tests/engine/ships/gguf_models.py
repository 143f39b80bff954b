"""Small random models with a tokenizer of their own, for what a GGUF file says and how it is read."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 400
SPECIAL = ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def save_model(folder: Path, model_type: str, **config: Any) -> Path:
    """A random fp32 model whose biases and norms are not at their neutral values, with a tokenizer."""
    made = AutoConfig.for_model(model_type, **(SHAPE | config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(
    folder: Path,
    pattern: str | None = None,
    *,
    around: str = "$A",
    whole_words: bool = False,
    model: dict[str, Any] | None = None,
    **config: Any,
) -> None:
    """A byte-level tokenizer of 390 tokens.

    pattern   by which it splits text; None: as GPT-2 does
    around    template of what it puts around a text
    model     changes of tokenizer.json
    config    changes of tokenizer_config.json; None takes a key away
    """
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    special = [(token, index) for index, token in enumerate(SPECIAL)]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    described = json.loads(made.to_str()) | (model or {})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"} | config
    kept = {name: value for name, value in named.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
