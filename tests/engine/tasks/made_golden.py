"""`python -m tests.engine.tasks.made_golden PYTHON`: a tiny trained model in fp32, rows, and lm-eval's numbers on them.

PYTHON is that of an environment with lm-eval. Everything goes to tests/golden/lm_eval.
"""

import json
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.tiny_model import Recipe, make_tiny_model

GOLDEN = Path(__file__).parents[2] / "golden" / "lm_eval"
RECIPE = Recipe(vocabulary=320, width=32, intermediate=64, blocks=2, positions=128, steps=150, batch=8, length=48)
CHOICES, ANSWERS = 40, 16


def main(python: str) -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        made = make_tiny_model(Path(folder) / "model", RECIPE)
        AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).save_pretrained(GOLDEN)
        for file in made.glob("tokenizer*"):
            shutil.copy(file, GOLDEN)
    for name, rows in (("choices", choices()), ("answers", answers()), ("texts", texts())):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (GOLDEN / f"{name}.jsonl").write_text("".join(lines))
    script = Path(__file__).with_name("lm_eval_numbers.py")
    subprocess.run([python, "-P", script, GOLDEN, GOLDEN, GOLDEN / "numbers.json"], check=True)


def sentences() -> list[str]:
    """Sentences of Python's reference, in order."""
    whole = " ".join(" ".join(text.split()) for _, text in sorted(pydoc_data.topics.topics.items()))
    return [each for each in re.split(r"(?<=[.]) ", whole) if 60 < len(each) < 140]


def choices() -> list[dict[str, object]]:
    """The end of a sentence among ends of others; some choices are long, and some have characters of several bytes."""
    found, rows = sentences(), list[dict[str, object]]()
    for i in range(CHOICES):
        words = found[7 * i].split()
        ends = [" ".join(words[6:9]), *(" ".join(found[7 * i + k].split()[2 : 4 + k]) for k in (1, 2, 3))]
        ends[1 + i % 3] = "größer als Zürich, naïve café" if i % 2 == 0 else ends[1 + i % 3]
        right = i % 4
        ends[0], ends[right] = ends[right], ends[0]
        asked = " ".join(words[:6]) + (" " if i % 5 == 0 else "")
        rows.append({"question": "" if i % 13 == 12 else asked, "choices": ends, "answer": right})
    return rows


def answers() -> list[dict[str, str]]:
    """Prompts with what the model writes after half of them, and with something else after the others."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(GOLDEN), AutoTokenizer.from_pretrained(GOLDEN)
    rows = []
    for i, sentence in enumerate(sentences()[500 : 500 + ANSWERS]):
        prompt = " ".join(sentence.split()[:5])
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        said = tokenizer.decode(made, skip_special_tokens=True).split("\n")[0].strip()
        rows.append({"prompt": prompt, "answer": said if said and i % 2 == 0 else "no such thing"})
    return rows


def texts() -> list[dict[str, str]]:
    """Texts shorter and longer than the model's positions, one of them just as long as a few windows."""
    found = sentences()
    return [{"text": " ".join(found[200 + 20 * i : 200 + 20 * i + count])} for i, count in enumerate((1, 2, 5, 14, 3))]


if __name__ == "__main__":
    main(sys.argv[1])
