"""Rows of a dataset's files: what a file says is what a job reads, in every layout of JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.domain.request.sources import HubDataset
from bitwright.errors import InvalidDataset
from tests.child.hub_server import COMMIT
from workers.child.dataset_rows import dataset_rows, json_values

ROWS: list[dict[str, object]] = [
    {"prompt": f'[{n}], }}"\u2028 when?', "completion": f"2026-11-{n:02}", "more": [{"at": ["2026-11-01T10:00:00Z"]}]}
    for n in range(1, 9)
]
LAYOUTS = {
    "objects on a line each": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "objects on several lines": "\n\n".join(json.dumps(row, indent=1) for row in ROWS),
    "an array on one line": json.dumps(ROWS),
    "an array on many lines": "\ufeff \n" + json.dumps(ROWS, indent=2),
    "two arrays": json.dumps(ROWS[:5], indent=1) + "\n" + json.dumps(ROWS[5:]),
    "an array and lines": json.dumps(ROWS[:-1]) + "\n" + json.dumps(ROWS[-1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_the_file_in_every_layout(layout: str) -> None:
    assert list(json_values(LAYOUTS[layout].split("\n"))) == ROWS


def test_values_come_before_the_file_is_read_to_its_end() -> None:
    def lines() -> Iterator[str]:
        yield "["
        for _ in range(2):
            yield json.dumps(ROWS[0]) + ","
        raise AssertionError("read further than asked")

    values = json_values(lines())
    assert [next(values), next(values)] == [ROWS[0]] * 2


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n{"a": 1\n{"a": 2}\n', '[{"a": 1}', '{"a": 1}\n]', "[1, 2", '["a\nb"]', "text"]
)
def test_what_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"line|no end"):
        list(json_values(text.split("\n")))


def test_a_value_of_very_many_lines_is_not_parsed_for_each_of_them() -> None:
    value = {"embedding": list(range(200_000))}
    assert list(json_values(json.dumps([value], indent=0).split("\n"))) == [value]


def of_files(folder: Path, **files: str) -> HubDataset:
    """A dataset of these files, which `datasets` finds in a folder as it does in a repository."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return HubDataset.model_construct(id=str(folder), config=None, split="train")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_dataset_have_the_strings_of_its_files(layout: str, tmp_path: Path) -> None:
    assert list(dataset_rows(of_files(tmp_path, train=LAYOUTS[layout]), COMMIT)) == ROWS


@pytest.mark.slow
def test_dates_after_the_first_megabytes_are_as_they_are_written(tmp_path: Path) -> None:
    """`datasets` infers types for each ten megabytes, and makes text of what it took for times, in its own way."""
    line = json.dumps({"text": "x" * 1000}) + "\n"
    last = {"text": "2026-11-01"}
    *_, found = dataset_rows(of_files(tmp_path, train=line * (11 << 10) + json.dumps(last)), COMMIT)
    assert found == last


@pytest.mark.slow
@pytest.mark.parametrize("other", [5, {"a": 1}, [{"type": "text", "text": "look"}]], ids=["number", "object", "list"])
def test_texts_beside_another_kind_of_value_stay_texts(other: object, tmp_path: Path) -> None:
    """`datasets` reads every text of such a column as JSON, if it can."""
    values = ["hello", "007", "null", '"yes"', '{"city": "Oslo"}', other]
    rows = [{"messages": [{"role": "assistant", "content": value}]} for value in values]
    train = "".join(json.dumps(row) + "\n" for row in rows)
    assert list(dataset_rows(of_files(tmp_path, train=train), COMMIT)) == rows


@pytest.mark.slow
def test_texts_in_an_array_are_rows_and_numbers_of_a_column_of_texts_are_text(tmp_path: Path) -> None:
    assert list(dataset_rows(of_files(tmp_path, train='["2026-11-01", "b"]'), COMMIT)) == [
        {"text": "2026-11-01"},
        {"text": "b"},
    ]
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - {name: n, dtype: int64}\n---\n"
    )
    found = list(
        dataset_rows(of_files(tmp_path, train='[{"text": 5, "n": 1}, {"text": "2026-11-01", "n": 2}]'), COMMIT)
    )
    assert found == [{"text": "5", "n": 1}, {"text": "2026-11-01", "n": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(("content", "row"), [('{"text": "a"}\n{"text":\n}', 2), ('["a", 5]', 2), ("[" * 100_000, 1)])
def test_what_is_no_row_is_named_by_its_number(content: str, row: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=f"row {row} is not a JSON object"):
        list(dataset_rows(of_files(tmp_path, train=content), COMMIT))
