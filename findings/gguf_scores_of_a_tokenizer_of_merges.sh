#!/bin/bash
# gguf-py's LlamaHfVocab, by which llama.cpp's converter writes tokenizers of BPE with bytes to fall back on that have no
# tokenizer.model (Llama 2, Mistral and Gemma as transformers 5 saves them), gives every token the same score. The
# algorithm that the file then names (`tokenizer.ggml.model` = llama) merges by score alone, and the file has no merges:
# pieces are merged from the left, not in the tokenizer's order, and text becomes other tokens. Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --clear --without-pip "$folder/venv" && python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q transformers==5.23.0 tokenizers==0.23.1 gguf==0.19.0
cat > "$folder/scores.py" <<'PYTHON'
import sys
from pathlib import Path

from gguf import LlamaHfVocab
from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
folder = Path(sys.argv[1])
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), SPACE, "a", "b", "c", "bc", "ab"]
model = models.BPE({token: index for index, token in enumerate(tokens)}, [("b", "c"), ("a", "b")], byte_fallback=True)
made = Tokenizer(model)
made.normalizer = normalizers.Replace(" ", SPACE)
made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
made.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
scores = {text.decode(): score for text, score, _ in LlamaHfVocab(folder).all_tokens()}


def by_score(text: str) -> list[str]:
    """As llama.cpp: the pair whose token has the best score, of equal ones the leftmost."""
    pieces = list(text)
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in scores]:
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


print("scores of bc and ab:", scores["bc"], scores["ab"])
print("abc by the merges:", made.encode("abc").tokens, "and by the scores:", by_score("abc"))
sys.exit(0 if made.encode("abc").tokens == ["a", "bc"] and by_score("abc") == ["ab", "c"] else 1)
PYTHON
mkdir "$folder/model"
"$folder/venv/bin/python" "$folder/scores.py" "$folder/model"
