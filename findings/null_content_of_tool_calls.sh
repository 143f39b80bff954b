#!/bin/bash
# A chat template that asks whether a message's content is none is never told so: transformers drops fields that are
# null before it renders. The published DeepSeek-V3 template, given OpenAI's own form of a tool call (content null),
# therefore fails with "'dict object' has no attribute 'content'". Exits 0 while that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" install --quiet --no-deps trl==1.16.0  # for its copy of the template alone
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

files = distribution("trl").files
template = next(Path(f.locate()).read_text() for f in files if str(f).endswith("chat_templates/deepseekv3.jinja"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", chat_template=template)
call = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

print("transformers", version("transformers"), "jinja2", version("jinja2"), "template of trl", version("trl"))
plain = jinja2.Environment().from_string(template).render(messages=messages, bos_token="<s>")
print("the template in jinja2 alone:", plain)
try:
    through = tokenizer.apply_chat_template(messages, tokenize=False)
except Exception as error:
    through = f"{type(error).__name__}: {error}"
print("through apply_chat_template: ", through)
as_seen = '{"city": "Rome"}' in plain and "has no attribute 'content'" in through
sys.exit(0 if as_seen else 1)
PYTHON
