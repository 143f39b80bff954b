"""Rows of the formats that others document, as calibration, evaluation and training read them: one reader for all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from app.domain.request.finetuning import Finetune
from app.domain.request.job_request import Calibration, Evaluation
from app.domain.request.sources import LocalText
from bitwright.errors import InvalidDataset
from tests.engine.text.published_templates import END, START, made_tokenizer
from workers.engine.text.examples import Examples, read_examples
from workers.engine.text.sequences import calibration_sequences, evaluation_sequences, load_tokenizer

Write = Callable[..., Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content %}{{- m.content }}{%- endif %}{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + ARGUMENTS + '</call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
USER, ANSWER = {"role": "user", "content": "asks"}, {"role": "assistant", "content": "answers"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome", "days": 2}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def examples(tokenizer: PreTrainedTokenizerBase, file: Path, **fields: Any) -> Examples:
    part = Finetune(dataset=LocalText(path=str(file)), **{"validation_share": 0.0, "sequence_length": 4096, **fields})
    return read_examples(tokenizer, part, file)


def read(template: str, write_lines: Write, row: dict[str, Any], **fields: Any) -> tuple[str, str]:
    """The text of a row, and what of it is learned."""
    tokenizer = made_tokenizer(template)
    (example,) = examples(tokenizer, write_lines("rows.jsonl", [row]), **fields).training
    return tokenizer.decode(example.ids), tokenizer.decode(example.ids[example.loss_mask])


def refused(template: str, write_lines: Write, row: dict[str, Any], says: str, **fields: Any) -> str:
    """The hint of the error for a row after a good one."""
    with pytest.raises(InvalidDataset, match=f"line 2: {says}") as caught:
        examples(made_tokenizer(template), write_lines("rows.jsonl", [{"text": "fine"}, row]), **fields)
    return str(caught.value.hint)


def test_tools_are_given_to_the_template(write_lines: Write) -> None:
    template = TOOLS.replace("ARGUMENTS", "(c.function.arguments | tojson)")
    text, loss_mask = read(template, write_lines, {"messages": [USER, ANSWER], "tools": [TOOL]})
    tokenizer = made_tokenizer(template)
    assert text == tokenizer.apply_chat_template([USER, ANSWER], tools=[TOOL], tokenize=False)
    assert loss_mask == "answers<|im_end|>\n"
    assert read(template, write_lines, {"messages": [USER, ANSWER], "tools": json.dumps([TOOL])})[0] == text
    assert "tool" in refused(CHATML, write_lines, {"messages": [USER, ANSWER], "tools": [TOOL]}, r"tools\.0 is not")


@pytest.mark.parametrize("arguments", ["(c.function.arguments | tojson)", "c.function.arguments"])
@pytest.mark.parametrize("given", [CALL["function"], {"name": "look", "arguments": '{"city": "Rome", "days": 2}'}])
def test_arguments_are_json_whatever_the_row_and_the_template_have(
    arguments: str, given: dict[str, Any], write_lines: Write
) -> None:
    template = TOOLS.replace("ARGUMENTS", arguments)
    row = {"messages": [USER, {**CALLS, "tool_calls": [{"type": "function", "function": given}]}]}
    assert read(template, write_lines, row)[1] == '<call>look{"city": "Rome", "days": 2}</call><|im_end|>\n'


def test_arguments_are_never_pythons_repr(write_lines: Write) -> None:
    printed = TOOLS.replace("ARGUMENTS", "(c.function.arguments | string)")
    assert read(printed, write_lines, {"messages": [USER, CALLS]})[1].startswith('<call>look{"city": "Rome"')
    always = TOOLS.replace("ARGUMENTS", "(dict(city='Rome') | string)")
    refused(always, write_lines, {"messages": [USER, CALLS]}, r"messages\.1\.tool_calls: the model's chat template")


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_call_that_the_template_does_not_write_is_an_error(content: dict[str, Any], write_lines: Write) -> None:
    row = {"messages": [USER, {**CALLS, **content}]}
    refused(CHATML, write_lines, row, r"messages\.1\.tool_calls .* is not written .*, and the message has no content")
    refused(CHATML, write_lines, {"messages": [USER, {**CALLS, **ANSWER}]}, r"messages\.1\.tool_calls")


def test_content_in_parts_is_the_same_text(write_lines: Write) -> None:
    parts = [{"type": "text", "text": "ans"}, {"type": "text", "text": "wers"}]
    joined = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    )
    row = {"messages": [USER, {**ANSWER, "content": parts}]}
    assert read(joined, write_lines, row)[0] == "user: asks\nassistant: answers\n"
    assert read(CHATML, write_lines, row)[1] == "ans\nwers<|im_end|>\n"
    wants = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %};{% endfor %}"
    assert read(wants, write_lines, {"messages": [USER, ANSWER]})[0] == "user:asks;assistant:answers;"


def test_weights_say_what_is_learned(write_lines: Write) -> None:
    again = {"role": "assistant", "content": "answers again"}
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**again, "weight": 1}]}
    assert read(CHATML, write_lines, row)[1] == "answers again<|im_end|>\n"
    text, loss_mask = read(CHATML, write_lines, row, loss_on="all")
    assert loss_mask == text.replace("answers<|im_end|>\n", "", 1)
    none = {"messages": [USER, {**ANSWER, "weight": 0}]}
    assert "weight" in refused(CHATML, write_lines, none, "messages has no message that is learned")
    tags = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert read(tags, write_lines, row)[1] == "answers again"


@pytest.mark.parametrize("message", [{**ANSWER, "content": ""}, {**ANSWER, "content": " \n"}])
def test_an_empty_answer_is_not_learned(message: dict[str, Any], write_lines: Write) -> None:
    assert "weight 0" in refused(CHATML, write_lines, {"messages": [USER, message]}, r"messages\.1 is an empty answer")
    row = {"messages": [USER, {**message, "weight": 0}, USER, ANSWER]}
    assert read(CHATML, write_lines, row)[1] == "answers<|im_end|>\n"


def test_what_a_template_does_not_write_is_refused(write_lines: Write) -> None:
    known = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n{% endif %}"
    known += "{% endfor %}"
    row = {"messages": [{"role": "developer", "content": "orders"}, USER, ANSWER]}
    assert "role user or system" in refused(known, write_lines, row, r"messages\.0\.content \(role developer\)")
    assert "orders" in read(CHATML, write_lines, row)[0]
    thinking = {"messages": [USER, {**ANSWER, "thinking": "hm"}]}
    refused(CHATML, write_lines, thinking, r"messages\.1\.thinking .* is not written")
    settings = {"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}
    refused(CHATML, write_lines, settings, r"chat_template_kwargs\.enable_thinking is read by nothing")
    reads = CHATML + "{% if enable_thinking is false %}{{ 'at once' }}{% endif %}"
    assert read(reads, write_lines, settings)[0].endswith("at once")


def test_a_template_that_refuses_says_so_by_line_with_a_way_out(write_lines: Write) -> None:
    alternates = CHATML + "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    hint = refused(alternates, write_lines, {"messages": [ANSWER, USER]}, "the chat template refuses .*must alternate")
    assert "assistant, user" in hint


def test_the_way_out_of_turns_that_cannot_be_found_works(write_lines: Write) -> None:
    hidden = "{{ messages | map(attribute='content') | join('|') }}"
    row = {"messages": [USER, ANSWER]}
    hint = refused(hidden, write_lines, row, r"messages\.1 cannot be found")
    assert "{% generation %}" in hint
    assert read(hidden, write_lines, row, loss_on="all") == ("asks|answers", "asks|answers")
    tagged = "{{ messages[0].content }}|{% generation %}{{ messages[1].content }}{% endgeneration %}"
    assert read(tagged, write_lines, row) == ("asks|answers", "answers")


def test_a_default_system_prompt_is_not_learned(write_lines: Write) -> None:
    template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    text, loss_mask = read(template, write_lines, {"messages": [ANSWER, USER, ANSWER]})
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\nanswers")
    assert loss_mask == "answers<|im_end|>\n" * 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}assistant: {% endif %}{% endfor %}",
        "{% for i in range(messages | length) %}{% set m = messages[i] %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "{% macro say(m) %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endmacro %}{% for m in messages %}"
        "{% if m.role == 'nobody' %}{% continue %}{% endif %}{{ say(m) }}{% else %}{{ 'nothing' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "{%- for m in messages -%}\n   {%- for n in messages -%}{%- if n == m and loop.first -%}  {%- endif -%}"
        "   {%- endfor -%}   {{ m.role }}: {{ m.content }}{{ eos_token }}{{ '\n' }}\n  {%- endfor -%}"
        "  {%- if add_generation_prompt -%} assistant: {{ '' }}{%- endif -%}",
    ],
)
def test_turns_are_found_however_a_template_goes_through_messages(template: str, write_lines: Write) -> None:
    text, loss_mask = read(template, write_lines, {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "more"}]})
    talk = [USER, ANSWER, USER, {**ANSWER, "content": "more"}]
    assert text == made_tokenizer(template).apply_chat_template(talk, tokenize=False)
    assert "".join(loss_mask.split()) == f"answers{END}more{END}"


def test_first_and_last_tokens_are_there_once(write_lines: Write) -> None:
    tokenizer = made_tokenizer(CHATML, starts=True)
    rows = [
        {"text": f"{START}whole{END}"},
        {"text": f"whole{END}\n"},
        {"text": "whole"},
        {"prompt": f"{START}a", "completion": f"b{END}"},
        {"prompt": "a", "completion": "b"},
    ]
    file = write_lines("rows.jsonl", rows)
    texts = [tokenizer.decode(example.ids) for example in examples(tokenizer, file).training]
    assert texts == [
        f"{START}whole{END}",
        f"{START}whole{END}\n",
        f"{START}whole{END}",
        f"{START}ab{END}",
        f"{START}ab{END}",
    ]
    (pair,) = examples(tokenizer, write_lines("pair.jsonl", rows[3:4])).training
    assert tokenizer.decode(pair.ids[pair.loss_mask]) == f"b{END}"
    many = write_lines("many.jsonl", rows * 4)
    text = tokenizer.decode(
        calibration_sequences(tokenizer, Calibration(num_samples=3, sequence_length=20), many, 0, None).ids.flatten()
    )
    assert END + END not in text
    assert text.count(START) == 3
    with pytest.raises(InvalidDataset, match="line 1: completion is empty"):
        examples(tokenizer, write_lines("empty.jsonl", [{"prompt": "a", "completion": END}]))


def test_a_conversation_begins_as_its_template_says(write_lines: Write) -> None:
    for starts in (False, True):
        for template in (CHATML, "{{ bos_token }}" + CHATML):
            tokenizer = made_tokenizer(template, starts=starts)
            (example,) = examples(tokenizer, write_lines("rows.jsonl", [{"messages": [USER, ANSWER]}])).training
            wanted = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True)["input_ids"]
            assert example.ids.tolist() == wanted


def test_empty_rows_are_left_out_and_counted(small_model: Path, write_lines: Write) -> None:
    tokenizer = load_tokenizer(small_model)
    file = write_lines("rows.jsonl", [{"text": f"some words {n}", "id": n} for n in range(40)] + [{"text": " "}] * 9)
    found = examples(tokenizer, file)
    assert len(found.training) == 40
    assert (found.notes.rows, found.notes.empty) == (49, 9)
    told = dict(found.notes.warnings("finetune.dataset"))
    assert told["empty_rows"].startswith("finetune.dataset: 9 of 49 rows hold no text")
    assert "id (40 rows)" in told["ignored_columns"]
    sequences = calibration_sequences(tokenizer, Calibration(num_samples=4, sequence_length=16), file, 0, None)
    assert "</s></s>" not in "".join(tokenizer.batch_decode(sequences.ids))
    with pytest.raises(InvalidDataset, match="holds no text: its 64 rows are empty"):
        evaluation_sequences(
            tokenizer, Evaluation(num_samples=2, sequence_length=16), write_lines("e.jsonl", [{"text": ""}] * 64), 0
        )


def test_calibration_and_evaluation_read_as_training_does(write_lines: Write) -> None:
    template = TOOLS.replace("ARGUMENTS", "(c.function.arguments | tojson)")
    row = {"messages": [USER, CALLS, {"role": "tool", "content": "seen"}, ANSWER], "tools": [TOOL]}
    tokenizer, file = made_tokenizer(template), write_lines("rows.jsonl", [row] * 8)
    text = read(template, write_lines, row)[0]
    length = len(tokenizer(text)["input_ids"]) + 1
    part = {"num_samples": 2, "sequence_length": length}
    for sequences in (
        calibration_sequences(tokenizer, Calibration(**part), write_lines("rows.jsonl", [row] * 8), 0, None),
        evaluation_sequences(tokenizer, Evaluation(**part), file, 0),
    ):
        assert [tokenizer.decode(ids) for ids in sequences.ids] == [text + END] * 2
    bad = write_lines("bad.jsonl", [row, {"messages": [{"role": "user", "content": 3}]}])
    for name, call in (("calibration", calibration_sequences), ("evaluation", evaluation_sequences)):
        kind: Any = Calibration if name == "calibration" else Evaluation
        with pytest.raises(InvalidDataset, match=rf"{name}\.dataset: line 2: messages\.0\.content is a number"):
            call(tokenizer, kind(num_samples=9, sequence_length=length), bad, 0, None)


def test_thoughts_that_a_template_drops_from_history_are_told(write_lines: Write) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if loop.last and m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endfor %}"
    )
    thought = {**ANSWER, "reasoning_content": "hm"}
    tokenizer = made_tokenizer(template)
    file = write_lines("rows.jsonl", [{"messages": [{**USER, "name": "Ada"}, thought, USER, thought]}])
    found = examples(tokenizer, file)
    (example,) = found.training
    assert tokenizer.decode(example.ids).count("<think>hm</think>") == 1
    told = dict(found.notes.warnings("finetune.dataset"))
    assert "earlier turns of 1 rows" in told["template_leaves_out"]
    assert "messages.*.name (1 rows)" in told["ignored_columns"]
