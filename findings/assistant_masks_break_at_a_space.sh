#!/usr/bin/env bash
# transformers 5.23.0, `apply_chat_template(return_assistant_tokens_mask=True)`, by which trl and others train on answers alone: one guesses that
# a space at an end of an answer moves the mask by a token at most. Where the tokenizer trims offsets (`processors.ByteLevel()` of
# tokenizers does unless it is told otherwise), one answer that ends with a space puts everything after it into the mask, the
# user's next questions and the template's own marks; one that begins with a space leaves this answer and all later ones out. Nothing is
# raised or warned of. The same template with trim_offsets=False masks all of these conversations right.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|end|>{% endfor %}"
)


def tokenizer(**options: bool) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(**options)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["user: assistant: ask yes no one two"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


def masked(tokens: PreTrainedTokenizerFast, answers: list[str]) -> str:
    """The text of the tokens that the mask says to train on."""
    turns = [turn for answer in answers for turn in (("user", "ask"), ("assistant", answer))]
    messages = [{"role": role, "content": content} for role, content in turns]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = tokens.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return tokens.decode([one for one, kept in zip(made["input_ids"], made["assistant_masks"], strict=True) if kept])


trims, keeps = tokenizer(), tokenizer(trim_offsets=False)
seen = {
    ("yes", "no", "one"): "yesnoone",
    ("yes", "no ", "one"): "yesno <|end|><|start|>user:ask<|end|><|start|>assistant:one<|end|>",
    ("yes", " no", "one"): "yes",
}
right = True
for answers, expected in seen.items():
    found, other = masked(trims, list(answers)), masked(keeps, list(answers))
    print(f"{answers}: trains on {found!r}; with trim_offsets=False on {other!r}")
    right &= found == expected and other == "".join(answers)
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" 2> "$folder/err" || { cat "$folder/err"; exit 1; }
