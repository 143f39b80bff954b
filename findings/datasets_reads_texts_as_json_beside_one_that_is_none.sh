#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("json"): a column of texts in which one row has something else, a number, an object, or a list of parts as
# messages with images have. One guesses an error, as of old, or that texts stay texts beside it. The column becomes `Json`, and every text
# of every row that can be read as JSON is: "007" becomes the number 7, "null" and "NaN" become None, "\"yes\"" loses its quotation marks, and an
# answer or a tool call's arguments that are JSON in a string, as OpenAI's are, become dictionaries, which a chat template prints in
# Python's way. Texts that are no JSON stay, so that the first rows look right; nothing is said. Without that one row all are as written.
# Streaming does the same. `features=` with Value("string") is the way out, where rows can be made of one kind.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile datasets==5.2.0 jinja2==3.1.6
cat > "$folder/try.py" <<'PYTHON'
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset
from jinja2 import Template

folder = Path(sys.argv[1])
print("datasets", version("datasets"))
texts = ["hello", "007", "1e3", "null", "NaN", '"yes"', '{"city": "Oslo"}']
parsed = ["hello", 7, 1000.0, None, None, "yes", {"city": "Oslo"}]
parts = [{"type": "text", "text": "look"}]


def loaded(name: str, contents: list, streaming: bool = False) -> list:
    """The same contents after a way through a file of conversations."""
    rows = [{"messages": [{"role": "assistant", "content": content}]} for content in contents]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"), streaming=streaming)
        return [row["messages"][0]["content"] for row in data]


alone = loaded("alone", texts)
beside = {kind: loaded(kind, [*texts, other]) for kind, other in (("a list", parts), ("a number", 5), ("an object", {"a": 1}))}
streamed = loaded("streamed", [*texts, parts], streaming=True)
print("texts alone:", "as written" if alone == texts else alone)
for kind, found in beside.items():
    print(f"beside {kind}: {found[:-1]}")
prompt = Template("{{ content }}").render(content=beside["a list"][6])
print("a template prints", prompt, "of", texts[6])
right = alone == texts and streamed == [*parsed, parts] and prompt == "{'city': 'Oslo'}"
right &= all(found[:-1] == parsed for found in beside.values())
right &= type(streamed[1]) is int
sys.exit(0 if right else "the behaviour has changed")
PYTHON
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2> "$folder/err" || { tail -20 "$folder/err"; exit 1; }
