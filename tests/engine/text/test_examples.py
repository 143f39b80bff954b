"""Rows become examples: what is learned of each kind, what is refused, and how they share sequences."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from app.domain.request.finetuning import Finetune
from app.domain.request.sources import LocalText
from bitwright.errors import InvalidDataset
from workers.engine.device.process_group import ProcessGroup
from workers.engine.text.documents import Half, half_of, read_jsonl
from workers.engine.text.examples import Example, Examples, read_examples
from workers.engine.text.packing import Order, PackedSequences, batch_of
from workers.engine.text.sequences import load_tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(small_model)


def read(tokenizer: PreTrainedTokenizerBase, file: Path, half: Half | None = None, **fields: Any) -> Examples:
    part = Finetune(dataset=LocalText(path=str(file)), **{"validation_share": 0.0, "sequence_length": 64, **fields})
    return read_examples(tokenizer, part, file, half)


def learned_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example.ids[example.loss_mask]))


def whole_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example.ids))


CONVERSATION = [
    {"role": "user", "content": "how wide"},
    {"role": "assistant", "content": "four bits"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "two bits"},
]


def test_what_is_learned_of_each_kind_of_row(tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    rows: list[Any] = [
        {"text": "all of this"},
        {"prompt": "a question: ", "completion": "the answer"},
        {"messages": CONVERSATION},
    ]
    file = write_lines("rows.jsonl", rows)
    text, pair, talk = read(tokenizer, file).training
    assert whole_text(tokenizer, text) == "all of this</s>"
    assert learned_text(tokenizer, text) == "all of this</s>"
    assert whole_text(tokenizer, pair) == "a question: the answer</s>"
    assert learned_text(tokenizer, pair).strip() == "the answer</s>"
    assert whole_text(tokenizer, talk) == ("user: how wide\nassistant: four bits\nuser: and now\nassistant: two bits\n")
    assert learned_text(tokenizer, talk) == " four bits\n two bits\n"
    for example in read(tokenizer, file, loss_on="all").training:
        assert learned_text(tokenizer, example) == whole_text(tokenizer, example)


def test_what_is_learned_is_the_same_of_a_tokenizer_that_trims_offsets(small_model: Path, write_lines: Write) -> None:
    """Trimmed offsets leave white space out, which the tokens themselves have."""
    from tokenizers.processors import ByteLevel

    answers = ["  four bits  ", " four bits", "four bits ", "\n four\n\n bits \n"]
    pairs = [{"prompt": prompt, "completion": answer} for prompt in ("how wide ", "how wide") for answer in answers]
    talks = [
        {"messages": [{**turn, "content": answer} if turn["role"] == "assistant" else turn for turn in CONVERSATION]}
        for answer in answers
    ]
    file = write_lines("spaces.jsonl", [*pairs, *talks])
    learned = {}
    for trims in (False, True):
        tokenizer = load_tokenizer(small_model)
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trims)
        learned[trims] = [(one.ids.tolist(), one.loss_mask.tolist()) for one in read(tokenizer, file).training]
    assert learned[True] == learned[False]


def test_a_row_begins_as_the_tokenizer_begins_a_text(small_model: Path, write_lines: Write) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(small_model)
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    (pair,) = read(tokenizer, write_lines("rows.jsonl", [{"prompt": "a ", "completion": "b"}])).training
    assert whole_text(tokenizer, pair) == "<s>a b</s>"
    assert not pair.loss_mask[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": ""}, "line 2: completion is empty"),
        ({"messages": CONVERSATION[:1]}, "line 2: messages has no message whose role is assistant"),
        ({"txt": "a"}, r"line 2 is an object without text; its fields are \['txt'\]"),
        ({"prompt": "a", "completion": 3}, "line 2: completion is a number"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named(
    row: dict[str, Any], words: str, tokenizer: PreTrainedTokenizerBase, write_lines: Write
) -> None:
    with pytest.raises(InvalidDataset, match=words) as caught:
        read(tokenizer, write_lines("rows.jsonl", [{"text": "fine"}, row]))
    assert caught.value.field == "finetune.dataset"
    assert caught.value.hint


def test_a_template_that_rewrites_earlier_turns_is_learned_as_it_writes_them(
    small_model: Path, write_lines: Write
) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% if loop.last and m['role'] == 'assistant' %}*{% endif %}"
        "{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (both,) = read(tokenizer, write_lines("rows.jsonl", [{"messages": CONVERSATION}])).training
    assert learned_text(tokenizer, both) == "four bits\n*two bits\n"
    (last,) = read(tokenizer, write_lines("last.jsonl", [{"messages": CONVERSATION[:2]}])).training
    assert learned_text(tokenizer, last) == "*four bits\n"


def test_a_template_is_rendered_in_a_sandbox(small_model: Path, write_lines: Write) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(InvalidDataset, match="line 1: the chat template refuses"):
        read(tokenizer, write_lines("rows.jsonl", [{"messages": CONVERSATION}]))


def test_long_rows_are_cut_so_that_each_token_is_learned_once(
    tokenizer: PreTrainedTokenizerBase, write_lines: Write
) -> None:
    words = " ".join(random.Random(0).choices(["grid", "scale", "code"], k=60))
    file = write_lines("rows.jsonl", [{"text": words}])
    (whole,) = read(tokenizer, file, sequence_length=4096).training
    pieces = read(tokenizer, file, sequence_length=16).training
    assert max(len(piece.ids) for piece in pieces) == 16
    assert [*pieces[0].ids.tolist(), *(i for piece in pieces[1:] for i in piece.ids[1:].tolist())] == whole.ids.tolist()
    assert sum(int(piece.loss_mask[1:].sum()) for piece in pieces) == int(whole.loss_mask[1:].sum())


def test_prompts_that_leave_no_room_are_counted_or_refused(
    tokenizer: PreTrainedTokenizerBase, write_lines: Write
) -> None:
    rows = [
        {"prompt": "scale " * 40, "completion": "late"},
        {"prompt": "short ", "completion": "code " * 40},
    ]
    found = read(tokenizer, write_lines("rows.jsonl", rows), sequence_length=16)
    assert (len(found.training), found.dropped, found.cut) == (1, 1, 2)
    with pytest.raises(InvalidDataset, match="1 rows have no completion within 16 tokens"):
        read(tokenizer, write_lines("rows.jsonl", rows[:1]), sequence_length=16)


def test_validation_is_split_by_content(tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    rows = [{"text": f"row {i} of many"} for i in range(200)]
    found = read(tokenizer, write_lines("a.jsonl", rows), validation_share=0.2)
    again = read(tokenizer, write_lines("b.jsonl", [{"text": "new"}, *reversed(rows)]), validation_share=0.2)

    def texts(examples: list[Example]) -> set[str]:
        return {whole_text(tokenizer, example) for example in examples}

    assert 20 <= len(found.validation) <= 60
    assert texts(found.validation) - {"new</s>"} == texts(again.validation) - {"new</s>"}
    assert not texts(found.validation) & texts(found.training)
    assert found.sha256 != again.sha256
    assert found.sha256 == read(tokenizer, write_lines("a.jsonl", rows), validation_share=0.2).sha256
    both = read(tokenizer, write_lines("a.jsonl", rows), half=Half.CALIBRATION)
    halves = [half_of(document) for document in read_jsonl(write_lines("a.jsonl", rows), "x")]
    assert len(both.training) == halves.count(Half.CALIBRATION)


def random_examples(count: int, longest: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [
        Example(
            torch.randint(1, 60, (length,), generator=generator, dtype=torch.int32),
            torch.rand(length, generator=generator) < 0.5,
        )
        for length in lengths
    ]


@pytest.mark.parametrize("together", [True, False])
def test_every_example_is_in_one_sequence_whole(together: bool) -> None:
    examples = random_examples(60, 32)
    packed = PackedSequences.pack(examples, 32, together=together)
    found = []
    for row in range(len(packed)):
        for number in range(int(packed.documents[row].max()) + 1):
            mine = packed.documents[row] == number
            found.append((packed.ids[row][mine].tolist(), packed.targets[row][mine].tolist()))
    expected = [(e.ids.tolist(), [*e.loss_mask[1:].tolist(), False]) for e in examples]
    assert sorted(found) == sorted(expected)
    tokens = sum(len(example.ids) for example in examples)
    if together:
        assert len(packed) <= 1.1 * tokens / 32 + 1
    else:
        assert len(packed) == 60


def test_a_batch_says_where_targets_and_positions_are() -> None:
    examples = [
        Example(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([False, False, True])),
        Example(torch.tensor([8, 9], dtype=torch.int32), torch.tensor([False, True])),
    ]
    batch = batch_of(PackedSequences.pack(examples, 16, together=True), torch.tensor([0]))
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert (batch.target_positions.tolist(), batch.labels.tolist(), batch.tokens) == ([1, 3], [7, 9], 5)
    alone = batch_of(PackedSequences.pack(examples, 16, together=False), torch.tensor([0, 1]))
    assert alone.documents is None
    assert (alone.target_positions.tolist(), alone.labels.tolist()) == ([1, 8], [7, 9])


def test_an_epoch_reads_everything_once_in_an_order_of_its_own() -> None:
    packed = PackedSequences.pack(random_examples(10, 32), 32, together=False)
    order = Order(packed, batch_size=4, micro_batch=3, seed=7)
    read_rows = torch.cat([order.rows(step) for step in range(5)])
    assert sorted(read_rows[:10].tolist()) == sorted(read_rows[10:].tolist()) == list(range(10))
    assert read_rows[:10].tolist() != read_rows[10:].tolist()
    assert torch.equal(order.rows(3), Order(packed, 4, 1, 7).rows(3))
    assert not torch.equal(order.rows(3), Order(packed, 4, 1, 8).rows(3))
    step = order.step(2)
    assert [len(batch.ids) for batch in step.batches] == [3, 1]
    shares = [Order(packed, 4, 3, 7, ProcessGroup(rank, 3)).step(2) for rank in range(3)]
    assert [sum(len(batch.ids) for batch in share.batches) for share in shares] == [2, 1, 1]
    assert {share.targets for share in shares} == {step.targets} == {sum(len(b.target_positions) for b in step.batches)}
    assert len(Order(packed, 25, 25, 7).rows(0)) == 25
