#!/bin/bash
# transformers: of a folder whose config.json says qwen2, AutoTokenizer takes vocabulary and merges from tokenizer.json,
# and replaces how tokenizer.json splits and normalizes text by rules of Qwen2Tokenizer, without a word: the same file
# gives other tokens than tokenizers.Tokenizer.from_file. Saving writes the replaced rules. Exits with 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --clear --without-pip "$folder/venv" && python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q transformers==5.23.0 tokenizers==0.23.1
cat > "$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

folder = Path(sys.argv[1])
made = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")  # digits in threes, as Llama 3 has them
made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
made.train_from_iterator(["123 123 123 cafe"] * 9, trainer)
made.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

text = "123"
says = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).tokens
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("tokenizer.json itself:    ", says)
found = {}
for model_type in ("llama", "qwen2"):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    found[model_type] = loaded.tokenize(text)
    print(f"config.json says {model_type}:  ", found[model_type], type(loaded).__name__)
sys.exit(not (found["llama"] == says == ["123"] and found["qwen2"] == ["1", "2", "3"]))
PYTHON
mkdir "$folder/model"
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>&1 | grep -v "PyTorch was not found"
exit "${PIPESTATUS[0]}"
