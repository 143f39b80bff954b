"""Mixtures of calibration text: shares, kinds of rows, held-out rows, and what a starved kind looks like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.request.job_request import JobRequest
from app.domain.request.mixtures import MixedPart, sequences_of
from app.domain.request.sources import BuiltinText, LocalText
from bitwright.errors import InvalidDataset, InvalidRequest
from bitwright.events import WarningEvent
from tests.engine.conftest import finish
from workers.disk.orders import AttemptOrder
from workers.engine.job_texts import read_files
from workers.engine.text.documents import hash_of
from workers.engine.text.mixture import HELD_OUT_BELOW, HELD_OUT_BYTE
from workers.engine.text.sequences import load_tokenizer

WORDS = [
    "the",
    "bell",
    "of",
    "old",
    "iron",
    "rings",
    "over",
    "water",
    "while",
    "seven",
    "grey",
    "birds",
    "count",
    "what",
    "is",
    "left",
    "of",
    "a",
    "winter",
]


def number_rows(count: int) -> list[dict[str, str]]:
    """Texts of digits, which the tiny models have hardly seen."""
    return [{"text": " ".join(str((i * 7919 + k * 104729) % 99991) for k in range(60))} for i in range(count)]


def talks(count: int, tools: bool = False) -> list[dict[str, Any]]:
    """Conversations, with tools or without."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        asked = " ".join(WORDS[(i + k * k) % len(WORDS)] for k in range(40))
        row: dict[str, Any] = {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": asked}]
        }
        rows.append(row | ({"tools": [{"type": "function", "function": {"name": f"f{i}"}}]} if tools else {}))
    return rows


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [([0.5, 0.5], 8, [4, 4]), ([0.9, 0.1], 8, [7, 1]), ([0.98, 0.01, 0.01], 10, [8, 1, 1]), ([0.4, 0.6], 1, [0, 1])],
)
def test_sequences_follow_the_shares(shares: list[float], count: int, expected: list[int]) -> None:
    assert sequences_of([MixedPart(dataset=BuiltinText(), share=share) for share in shares], count) == expected


def request(parts: object, **fields: Any) -> dict[str, Any]:
    return {"model": "org/model", "method": "gptq", "calibration": {"dataset": parts}, **fields}


def test_a_list_of_datasets_is_a_mixture() -> None:
    parts = [{"dataset": "/a.jsonl", "share": 0.3}, {"dataset": "builtin", "share": 0.7, "kind": "text"}]
    parsed = JobRequest.parse(request(parts))
    assert [part.dataset for part in parsed.calibration.mixture] == [LocalText(path="/a.jsonl"), BuiltinText()]
    assert JobRequest.parse(json.loads(parsed.model_dump_json())) == parsed


@pytest.mark.parametrize(
    ("parts", "field", "words"),
    [
        ([{"dataset": "builtin", "share": 0.3}], "calibration.dataset", "add up to 1, not 0.3"),
        ([{"dataset": "builtin", "share": 0.5}] * 2, "calibration.dataset", "once"),
        ([{"dataset": "builtin", "share": "most"}], "calibration.dataset.0.share", "number"),
        ([{"dataset": "builtin"}], "calibration.dataset.0.share", "needed"),
        ([{"dataset": "generated", "share": 1.0}], "calibration.dataset.0.dataset", "must be"),
        ([{"dataset": "builtin", "share": 1.0, "kind": "poems"}], "calibration.dataset.0.kind", "must be"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_told_by_its_path(parts: object, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        JobRequest.parse(request(parts))
    (problem,) = refused.value.errors
    assert problem.field.startswith(field)
    assert words in problem.detail


def order_of(model: Path, files: list[Path], parts: list[dict[str, Any]], **more: Any) -> AttemptOrder:
    """An order whose calibration is a mixture of these files."""
    mixture = [{"dataset": str(file), **part} for file, part in zip(files, parts, strict=True)]
    sizes = {"num_samples": 8, "sequence_length": 32}
    body = request(mixture, evaluation={"num_samples": 2, "sequence_length": 48}, **more)
    body["calibration"] |= sizes
    others = {f"calibration.mixture.{n}.dataset": str(file) for n, file in enumerate(files)}
    return AttemptOrder(
        job_id="job_1",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=str(model),
        device="cpu",
        other_texts=others,
    )


def test_held_out_rows_never_calibrate(small_model: Path, write_lines: Callable[..., Path]) -> None:
    file = write_lines("rows.jsonl", number_rows(80))
    texts = read_files(order_of(small_model, [file], [{"share": 1.0}]), load_tokenizer(small_model))
    (probe,) = texts.probes
    assert texts.calibration is not None
    assert probe.ids.shape[1] == 48
    assert len(probe.ids) >= 1
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    held = [row for row in rows if hash_of(row)[HELD_OUT_BYTE] < HELD_OUT_BELOW]
    tokenizer = load_tokenizer(small_model)
    calibrated, measured = (tokenizer.decode(ids.flatten()) for ids in (texts.calibration.ids, probe.ids))
    assert 0 < len(held) < len(rows) / 3
    assert not any(row[:40] in calibrated for row in held)
    assert any(row[10:40] in measured for row in held)


def test_rows_of_one_kind_alone(small_model: Path, write_lines: Callable[..., Path]) -> None:
    """The template of the tiny model writes no tools, so that reading those rows would be an error."""
    file = write_lines("rows.jsonl", [*talks(60), *number_rows(60), *talks(3, tools=True)])
    parts: list[dict[str, Any]] = [{"share": 0.25, "kind": "text"}, {"share": 0.75, "kind": "messages"}]
    texts = read_files(order_of(small_model, [file, file], parts), load_tokenizer(small_model))
    assert texts.calibration is not None
    decoded = [load_tokenizer(small_model).decode(row) for row in texts.calibration.ids]
    assert sum(sum(map(str.isdigit, text)) > 10 for text in decoded) == 2
    assert [probe.name for probe in texts.probes] == ["text of rows.jsonl", "messages of rows.jsonl"]


def test_a_kind_without_a_row_is_refused_by_its_part(small_model: Path, write_lines: Callable[..., Path]) -> None:
    file = write_lines("rows.jsonl", number_rows(60))
    parts: list[dict[str, Any]] = [{"share": 0.5}, {"share": 0.5, "kind": "tools"}]
    with pytest.raises(InvalidDataset, match="no row of kind tools") as refused:
        read_files(order_of(small_model, [file, file], parts), load_tokenizer(small_model))
    assert refused.value.field == "calibration.mixture.1"


@pytest.mark.slow
def test_a_starved_kind_warns_and_its_distance_shows_it(
    small_model: Path, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    """GPTQ at 2 bits: weights fit the inputs that calibrated, so that a kind is nearer the more of it there was."""
    numbers, prose = write_lines("numbers.jsonl", number_rows(200)), write_lines("talks.jsonl", talks(200))

    def far(share: float) -> tuple[dict[str, float], list[str]]:
        parts = [{"dataset": str(numbers), "share": share}, {"dataset": str(prose), "share": 1 - share}]
        done = finish(
            small_model,
            tmp_path / f"at{share}",
            method="gptq",
            bits=2,
            calibration={"dataset": parts, "num_samples": 64, "sequence_length": 64},
            evaluation={"num_samples": 8, "sequence_length": 64},
            order={
                "other_texts": {
                    "calibration.mixture.0.dataset": str(numbers),
                    "calibration.mixture.1.dataset": str(prose),
                }
            },
        )
        assert done.report.quality is not None
        warnings = [line.code for line in done.lines if isinstance(line, WarningEvent)]
        return {kind.name: kind.kl_divergence for kind in done.report.quality.kinds}, warnings

    starved, warned = far(0.02)
    even, quiet = far(0.5)
    assert starved["numbers.jsonl"] > 1.2 * even["numbers.jsonl"]
    assert starved["numbers.jsonl"] > 1.2 * starved["talks.jsonl"]
    assert "starved_kind" in warned
    assert "starved_kind" not in quiet
