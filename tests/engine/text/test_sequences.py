"""Texts become sequences: which text, how it is cut, and that evaluation never reads what calibrated."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from app.domain.inputs.rows import Conversation, parse_row
from app.domain.request.job_request import Calibration, Evaluation
from bitwright.errors import InvalidDataset
from workers.disk.orders import BUILTIN_TEXT
from workers.engine.text import builtin
from workers.engine.text.builtin import builtin_documents, write_found
from workers.engine.text.documents import Half, half_of, read_jsonl
from workers.engine.text.sequences import calibration_sequences, evaluation_sequences, load_tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(small_model)


def calibration(samples: int, length: int) -> Calibration:
    return Calibration(num_samples=samples, sequence_length=length)


def evaluation(samples: int, length: int) -> Evaluation:
    return Evaluation(num_samples=samples, sequence_length=length)


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(seed)
    words = ["grid", "scale", "code", "block", "linear", "group", "rank", "token"]
    return [{"text": f"row{i}of{seed} " + " ".join(chance.choices(words, k=12))} for i in range(count)]


def test_builtin_text_falls_into_two_halves_of_some_size() -> None:
    documents = []
    for document in builtin_documents():
        documents.append(document)
        if len(documents) == 300:
            break
    halves = [half_of(document) for document in documents]
    assert len(set(documents)) == 300
    assert 100 < halves.count(Half.CALIBRATION) < 200


def test_windows_are_seeded_full_and_different(tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (
        calibration_sequences(tokenizer, calibration(20, 64), None, seed, None) for seed in (1, 1, 2)
    )
    assert first.ids.shape == (20, 64)
    assert first.ids.dtype == torch.int64
    assert first.sha256 == again.sha256 != other.sha256
    assert len({tuple(row) for row in first.ids.tolist()}) == 20
    assert not first.overlapping
    report = first.report()
    assert (report.source, report.num_samples, report.sequence_length, report.tokens) == ("builtin", 20, 64, 1280)


def test_windows_begin_as_the_tokenizer_begins_a_text(tokenizer: PreTrainedTokenizerBase, small_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = load_tokenizer(small_model)
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    plain = calibration_sequences(tokenizer, calibration(4, 32), None, 0, None).ids
    started = calibration_sequences(starting, calibration(4, 32), None, 0, None).ids
    assert (started[:, 0] == tokenizer.bos_token_id).all()
    assert not (plain[:, 0] == tokenizer.bos_token_id).any()
    assert started.shape == plain.shape


def test_builtin_calibration_and_evaluation_share_no_document(tokenizer: PreTrainedTokenizerBase) -> None:
    used = tokenizer.decode(calibration_sequences(tokenizer, calibration(40, 64), None, 0, None).ids.flatten())
    measured = tokenizer.decode(evaluation_sequences(tokenizer, evaluation(40, 64), None, 0, None).ids.flatten())
    for document in builtin_documents():
        start = document[50:110]
        assert not (start in used and start in measured)
        if half_of(document) is Half.EVALUATION and len(document) > 20_000:
            break


def test_one_file_for_both_is_split_by_document(tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    rows = sentences(80)
    file = write_lines("both.jsonl", rows)
    used = calibration_sequences(tokenizer, calibration(8, 64), file, 0, file)
    measured = evaluation_sequences(tokenizer, evaluation(8, 64), file, 0, file)
    assert_disjoint(tokenizer, rows, used.ids, measured.ids)
    alone = calibration_sequences(tokenizer, calibration(8, 64), file, 0, None)
    assert alone.sha256 != used.sha256


def test_rows_of_the_calibration_file_do_not_judge_from_another_file(
    tokenizer: PreTrainedTokenizerBase, write_lines: Write
) -> None:
    shared, own = sentences(40), sentences(40, seed=1)
    first, second = write_lines("a.jsonl", shared), write_lines("b.jsonl", shared + own)
    used = calibration_sequences(tokenizer, calibration(8, 64), first, 0, second)
    measured = evaluation_sequences(tokenizer, evaluation(8, 64), second, 0, first)
    assert_disjoint(tokenizer, shared + own, used.ids, measured.ids)


def assert_disjoint(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], used: torch.Tensor, measured: torch.Tensor
) -> None:
    """No row's first word, which is its own, is in both sets of sequences."""
    texts = ["".join(tokenizer.batch_decode(ids)) for ids in (used, measured)]
    starts = [row["text"].split()[0] + " " for row in rows]
    found = [{s for s in starts if s in text} for text in texts]
    assert all(len(f) > 2 for f in found)
    assert not found[0] & found[1]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "one two"},
        {"prompt": "one", "completion": " two"},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        {"text": "one \ud83d two"},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two\udc00"}]},
    ],
)
def test_the_kinds_of_rows(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    sequences = calibration_sequences(tokenizer, calibration(4, 16), write_lines("rows.jsonl", [row] * 40), 0, None)
    text = "".join(tokenizer.batch_decode(sequences.ids))
    assert "one" in text
    assert "two" in text
    assert ("user: one\nassistant: two" in text) == ("messages" in row)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no text"),
        ("\n\n", "holds no text"),
        ("not json\n", "line 1 is not JSON"),
        ('{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ('{"text": 5}\n', "line 1: text is a number"),
        ('{"prompt": "a"}\n', "line 1: prompt has no completion"),
        ('{"messages": []}\n', "line 1: messages is empty"),
        ('{"messages": ["hello"]}\n', r"line 1: messages\.0 is a text"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_a_file_that_is_no_dataset(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(InvalidDataset, match=problem) as caught:
        list(read_jsonl(file, "calibration.dataset"))
    assert caught.value.field == "calibration.dataset"
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"gone\.jsonl"):
        list(read_jsonl(tmp_path / "gone.jsonl", "evaluation.dataset"))


def test_a_short_file_says_how_much_there_is(tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    file = write_lines("short.jsonl", sentences(3))
    with pytest.raises(InvalidDataset, match=r"sequences of 64; 100 are asked for") as caught:
        calibration_sequences(tokenizer, calibration(100, 64), file, 0, None)
    assert "num_samples to at most" in str(caught.value.hint)


def test_text_that_the_jobs_other_datasets_hold_is_told_as_the_reason(
    tokenizer: PreTrainedTokenizerBase, write_lines: Write
) -> None:
    """A copy of the calibration text under another name leaves nothing to evaluate on: no count of samples helps."""
    rows = sentences(12)
    file, copy = write_lines("a.jsonl", rows), write_lines("b.jsonl", rows)
    with pytest.raises(InvalidDataset) as caught:
        evaluation_sequences(tokenizer, evaluation(2, 16), copy, 0, file)
    assert "has 0 tokens without 12 rows that other datasets of the job hold, too" in caught.value.detail
    assert "num_samples" not in str(caught.value.hint)
    more = write_lines("more.jsonl", [*rows, *sentences(12, seed=1)])
    assert evaluation_sequences(tokenizer, evaluation(2, 16), more, 0, file).ids.shape == (2, 16)


def test_text_of_two_parts_of_a_job_is_told_to_be_split(tokenizer: PreTrainedTokenizerBase, write_lines: Write) -> None:
    rows = sentences(12)
    file = write_lines("both.jsonl", rows)
    halves = [half_of(row["text"]) for row in rows]
    with pytest.raises(InvalidDataset) as caught:
        calibration_sequences(tokenizer, calibration(400, 64), file, 0, file)
    assert f"without {halves.count(Half.EVALUATION)} rows that fall to the job's other part" in caught.value.detail
    with pytest.raises(InvalidDataset) as caught:
        evaluation_sequences(tokenizer, evaluation(400, 64), file, 0, file)
    assert f"without {halves.count(Half.CALIBRATION)} rows that fall to the job's other part" in caught.value.detail


def test_messages_need_a_chat_template(small_model: Path, write_lines: Write) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = None
    file = write_lines("chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(InvalidDataset, match="no chat template"):
        calibration_sequences(tokenizer, calibration(1, 16), file, 0, None)


@pytest.mark.parametrize(
    "template",
    ["{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no system role') }}", "{% for %}"],
)
def test_a_hostile_or_broken_template_fails_the_job_and_runs_nothing(
    template: str, small_model: Path, write_lines: Write
) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = template
    file = write_lines("chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}] * 20)
    with pytest.raises(InvalidDataset, match="chat template refuses"):
        calibration_sequences(tokenizer, calibration(1, 16), file, 0, None)


def test_half_of_a_conversation_depends_on_its_content_alone() -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
    rows = [row, row | {"id": 7}]
    found = [parse_row(json.loads(json.dumps(row)))[0] for row in rows]
    halves = [half_of(replace(row, place=str(row))) for row in found if isinstance(row, Conversation)]
    assert halves[0] is halves[1]


def test_builtin_text_is_found_once_and_no_farther_than_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def texts() -> Iterator[str]:
        for text in ("a", "b", "a", "c"):
            found.append(text)
            yield text

    monkeypatch.setattr(builtin, "_reference_texts", texts)
    builtin._builtin.cache_clear()
    try:
        first, second = builtin_documents(), builtin_documents()
        assert (next(first), next(first), next(second)) == ("a", "b", "a")
        assert found == ["a", "b"]
        assert (list(second), list(first), list(builtin_documents())) == (["b", "c"], ["c"], ["a", "b", "c"])
        assert found == ["a", "b", "a", "c"]
    finally:
        builtin._builtin.cache_clear()


def test_builtin_text_that_a_worker_has_found_is_the_same_and_that_of_another_python_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "builtin.json"
    monkeypatch.setenv(BUILTIN_TEXT, str(file))
    monkeypatch.setattr(builtin, "_reference_texts", lambda: iter(["a", "b", "a"]))
    write_found()
    monkeypatch.setattr(builtin, "_reference_texts", lambda: iter(["walked"]))
    for content, expected in (
        (file.read_text(), ["a", "b"]),
        (json.dumps({"python": "4.0", "texts": ["other"]}), ["walked"]),
        ("{", ["walked"]),
    ):
        file.write_text(content)
        builtin._builtin.cache_clear()
        assert list(builtin_documents()) == expected
    builtin._builtin.cache_clear()
