#!/bin/bash
# A tokenizer that is SentencePiece's tokenizer.model alone, as Llama 2's, does not load in transformers with the
# package sentencepiece installed: it takes protobuf, too, of which a warning tells; the error that ends it speaks of
# tiktoken, as if the file were of that kind. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 sentencepiece==0.2.3
cat > "$folder/load.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
text = Path(json.__file__).read_text().splitlines()
SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
    byte_fallback=True, minloglevel=2,
)
names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(folder / "tokenizer_config.json").write_text(json.dumps(names))
print("transformers", version("transformers"), "sentencepiece", version("sentencepiece"))
try:
    loaded = AutoTokenizer.from_pretrained(folder)
    print("loaded:", type(loaded).__name__, loaded.encode("import json", add_special_tokens=False)[:4])
    said = ""
except Exception as error:
    said = f"{type(error).__name__}: {error}"
    print(said[:300])
sys.exit(0 if ("tiktoken" in said) == (sys.argv[2] == "fails") else 1)
PYTHON
mkdir "$folder/model"
"$folder/venv/bin/python" "$folder/load.py" "$folder/model" fails
"$folder/venv/bin/pip" install --quiet protobuf==7.36.2
"$folder/venv/bin/python" "$folder/load.py" "$folder/model" loads
