#!/usr/bin/env bash
# transformers 5.23.0 with gguf-py 0.19.0: a GGUF file names the rules by which its tokenizer splits text (`tokenizer.ggml.pre`), since the
# merges alone do not say it. Two files with the same tokens and merges and the names "llama-bpe" and "deepseek-v3", whose rules both take
# digits in threes, and one guesses that a loader reads the name or says that it does not know it. transformers knows llama-bpe; of
# deepseek-v3, deepseek-llm, falcon, smollm and most others it takes GPT-2's rules in silence, so that 1234 is one token where the model
# that the file was made of has 123 and 4. What is calibrated, measured or served with such a tokenizer sees other tokens for numbers.
#
# Needs a network for the installation only (PIP_ARGS for an index of CPU builds). Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile ${PIP_ARGS:-} torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cat > "$folder/try.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

print("transformers", version("transformers"), "gguf", version("gguf"))
MERGES = ["1 2", "12 3", "123 4"]
TOKENS = [*bytes_to_unicode().values(), "12", "123", "1234", "<s>"]


def tokens_of(name: str) -> list[str]:
    """Tokens of four digits by a file of a small Llama whose rules have this name."""
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(TOKENS) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").tokenize("1234")


seen = {name: tokens_of(name) for name in ("llama-bpe", "deepseek-v3", "deepseek-llm", "smollm", "falcon", "no-such-rules")}
for name, tokens in seen.items():
    print(f"{name}: 1234 -> {tokens}")
right = seen.pop("llama-bpe") == ["123", "4"] and all(tokens == ["1234"] for tokens in seen.values())
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
