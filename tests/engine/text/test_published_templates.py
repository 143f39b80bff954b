"""Every chat template that the installed `trl` carries: what is learned of rows of every kind, and what is refused.

The oracles are `apply_chat_template` for the text, and, where `trl` has a variant of the template for training that
writes the same text, the mask of its `{% generation %}` for what is learned. The default run has every template with
every kind of row, and every other setting with each of both; all together are in the slow run.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from app.domain.request.finetuning import Finetune
from app.domain.request.sources import LocalText
from bitwright.errors import InvalidDataset
from tests.engine.text.published_templates import CONTROL, END, ROWS, conversation, published, said, tokenizer_for
from workers.engine.text.examples import Example, read_examples

NAMES = sorted(published())
KINDS = list(ROWS)
ASKED_IN_THE_MASK = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
}
"""Templates whose variant for training learns the words that ask for an answer as well, and those words."""
WITHOUT_LAST_END = {"glm4moe"}
"""Templates that write no token after a last answer: that of the next turn ends it."""


def read(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], folder: Path, loss_on: str) -> Example:
    file = folder / "row.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    part = Finetune.model_validate(
        {
            "dataset": LocalText(path=str(file)).model_dump(),
            "validation_share": 0.0,
            "sequence_length": 16384,
            "loss_on": loss_on,
        }
    )
    (example,) = read_examples(tokenizer, part, file).training
    return example


def forms(row: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """A row's messages in the ways in which templates may want them: as they are, as parts, with JSON, with content."""
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in conversation(row)]
    yield plain
    texts = [{**m, "content": m["content"][0]["text"]} if isinstance(m.get("content"), list) else m for m in plain]
    yield texts
    yield [{**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in texts]
    for json_arguments in (False, True):
        yield [with_content(message, json_arguments=json_arguments) for message in texts]


def with_content(message: dict[str, Any], *, json_arguments: bool) -> dict[str, Any]:
    found = {"content": "", **message}
    if json_arguments and "tool_calls" in message:
        calls = message["tool_calls"]
        found["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}} for c in calls
        ]
    return found


def rendered(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> list[str]:
    """Renderings of each form that the template takes."""
    found = []
    for messages in forms(row):
        try:
            text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
        except Exception:
            continue
        found.append(str(text))
    return found


def needed(row: dict[str, Any]) -> Iterator[str]:
    """Texts that must occur for a row to be learned, but for thoughts that templates leave out of earlier turns."""
    yield from said(row)
    if "tools" in row:
        yield "Telling the weather."
    last = conversation(row)[-1]
    if "reasoning_content" in last:
        yield last["reasoning_content"]
    for message in conversation(row):
        for call in message.get("tool_calls", ()):
            yield call["function"]["arguments"]["city"]


def answers(row: dict[str, Any], *, loss_mask: bool) -> Iterator[str]:
    read_only = row.get("prompt", [])
    for message in conversation(row):
        if message["role"] == "assistant":
            counts = message.get("weight", 1) == 1 and message not in read_only
            content = message.get("content", "")
            text = content if isinstance(content, str) else content[0]["text"]
            if counts == loss_mask and "tool_calls" not in message and text:
                yield text.rpartition("</think>")[2].strip()


def learned_pieces(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    pieces: list[list[int]] = [[]]
    for token, is_learned in zip(example.ids.tolist(), example.loss_mask.tolist(), strict=True):
        if is_learned:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [str(tokenizer.decode(piece)) for piece in pieces if piece]


def check(name: str, kind: str, loss_on: str, starts: bool, folder: Path) -> bool:
    """True if a row is learned; it is as it should be, or refused with good reason."""
    tokenizer, row = tokenizer_for(name, starts=starts), ROWS[kind]
    texts = rendered(tokenizer, row)
    try:
        example = read(tokenizer, row, folder, loss_on)
    except InvalidDataset as refusal:
        check_refusal(refusal, row, texts)
        return False
    text = str(tokenizer.decode(example.ids))
    assert text in texts
    assert all(word in text for word in needed(row))
    pieces = learned_pieces(tokenizer, example)
    assert all(any(answer in piece for piece in pieces) for answer in answers(row, loss_mask=True))
    assert not any(answer in piece for piece in pieces for answer in answers(row, loss_mask=False))
    if loss_on == "completion":
        check_turns(name, row, pieces)
        check_mask(name, row, example)
    elif not list(answers(row, loss_mask=False)) or ("prompt" in row and not row["prompt"]):
        assert "".join(pieces) == text
    return True


def check_refusal(refusal: InvalidDataset, row: dict[str, Any], texts: list[str]) -> None:
    """No form of the row makes the template write all of it."""
    assert "line 1" in refusal.detail
    assert refusal.hint
    thoughts = [m["reasoning_content"] for m in conversation(row) if "reasoning_content" in m]
    words = [m["content"] for m in conversation(row) if "tool_calls" in m and "content" in m]
    wanted = [*needed(row), *thoughts, *words]
    assert not any(all(word in text for word in wanted) for text in texts), refusal.detail


def check_turns(name: str, row: dict[str, Any], pieces: list[str]) -> None:
    everything = "".join(pieces)
    assert not any(word in everything for word in [*said(row), "Telling the weather."])
    cities = [c["function"]["arguments"]["city"] for m in conversation(row) for c in m.get("tool_calls", ())]
    assert all(city in everything for city in cities)
    ended = pieces[:-1] if name in WITHOUT_LAST_END else pieces
    control = (*CONTROL.findall(published()[name]), END, "<tool_call|>")
    before = tuple(m["content"] for m in conversation(row) if "tool_calls" in m and "content" in m)
    assert all(piece.rstrip().endswith((*control, *before)) for piece in ended), pieces


def check_mask(name: str, row: dict[str, Any], example: Example) -> None:
    """Compares with the variant for training, where there is one that writes the same text and learns all turns."""
    if f"{name}_training" not in published() or list(answers(row, loss_mask=False)):
        return
    tokenizer = tokenizer_for(name)
    for messages in forms(row):
        try:
            found = tokenizer.apply_chat_template(
                messages,
                tools=row.get("tools"),
                chat_template=published()[f"{name}_training"],
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
        except Exception:
            continue
        if found["input_ids"] == example.ids.tolist():
            mask = [bool(each) for each in found["assistant_masks"]]
            more = [i for i, (a, b) in enumerate(zip(mask, example.loss_mask.tolist(), strict=True)) if a != b]
            words = str(tokenizer.decode([example.ids[i] for i in more]))
            if name in ASKED_IN_THE_MASK:
                assert all(mask[i] for i in more)
                assert words.replace(ASKED_IN_THE_MASK[name], "") == ""
            else:
                assert words.strip() in ("", "<|tool_response>")  # which ends a call: its answer begins
            return


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind(name: str, tmp_path: Path) -> None:
    loss_mask = 0
    for number, kind in enumerate(KINDS):
        turn = number + NAMES.index(name)
        loss_mask += check(name, kind, ("completion", "all")[turn % 3 == 2], turn % 2 == 1, tmp_path)
    assert loss_mask >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind_in_every_way(name: str, tmp_path: Path) -> None:
    for kind, loss_on, starts in product(KINDS, ("completion", "all"), (False, True)):
        check(name, kind, loss_on, starts, tmp_path)


def test_templates_that_rewrite_turns_are_learned(tmp_path: Path) -> None:
    """Prefixes of a conversation do not suffice: an assistant's turn is written differently when it is the last."""
    for name in ("qwen3", "qwen3_5_think", "gptoss", "phi3", "deepseekv3", "nemotron_3_nano"):
        for kind in ("two answers", "assistant first"):
            assert check(name, kind, "completion", False, tmp_path), (name, kind)
