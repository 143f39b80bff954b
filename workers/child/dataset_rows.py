"""Rows of a dataset of the Hub, with their strings as its files have them.

The reader of JSON in `datasets` infers types by pyarrow, which takes a column for points in time where every string of
some megabytes looks like one: answers that are dates come as datetimes, or in another way of writing. So files of JSON
are read here: objects on a line each or on several, and arrays of objects or of texts.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from app.domain.request.sources import HubDataset
from bitwright.errors import InvalidDataset

BETWEEN = " \t\r\n,\ufeff"
"""Characters between two values: blanks, an array's commas, and a file's mark of its encoding."""
STRINGS = ("string", "large_string")
DECODER = json.JSONDecoder()


def dataset_rows(dataset: HubDataset, commit: str) -> Iterable[Mapping[str, object]]:
    """Rows of a split at a commit, read as they are asked for; of a JSON file their values are those of the file.

    Raises:
        ValueError: no such configuration or split, or a file that is no table.
        InvalidDataset: a value of a file of JSON is no row.
    """
    from datasets import load_dataset, load_dataset_builder  # noqa: PLC0415 (takes a second; most jobs need it not)
    from datasets.packaged_modules.json.json import Json  # noqa: PLC0415

    builder = load_dataset_builder(dataset.id, dataset.config, revision=commit)
    files = dict(builder.config.data_files or {}).get(dataset.split)
    if not isinstance(builder, Json) or not files or builder.config.field is not None:
        rows: Iterable[Mapping[str, object]] = builder.as_streaming_dataset(split=dataset.split)
        return rows
    place = {"data_files": {"all": list(files)}, "split": "all", "encoding": builder.config.encoding}
    lines = load_dataset("text", **place, streaming=True)
    return _objects(dataset, (line["text"] for line in lines), builder.info.features or {})


def _objects(dataset: HubDataset, lines: Iterable[str], features: Mapping[str, Any]) -> Iterator[Mapping[str, object]]:
    """The values as rows; numbers of a column that the dataset says to be text are text."""
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", None) in STRINGS]
    number = 0
    try:
        for number, value in enumerate(json_values(lines), 1):
            row = {"text": value} if isinstance(value, str) else value
            if not isinstance(row, dict):
                raise _no_object(dataset, number)
            numbers = {name: json.dumps(row[name]) for name in texts if isinstance(row.get(name), int | float)}
            yield {**row, **numbers}
    except (ValueError, RecursionError) as error:
        raise _no_object(dataset, number + 1) from error


def json_values(lines: Iterable[str]) -> Iterator[object]:
    """The values in a text one after the other, and those in an array, one at a time.

    lines   of the text, of one file or of several; no string of JSON goes over the end of one

    Raises:
        ValueError: the text is no JSON.
        RecursionError: a value is nested too deep.
    """
    text, wanted, in_array = "", 0, False
    for line in lines:
        text += line + "\n"
        if len(text) < wanted:
            continue
        text, in_array = yield from _whole_values(text, in_array)
        # A value of many lines is looked at again when it is twice as long, not at each of them.
        wanted = 2 * len(text)
    text, in_array = yield from _whole_values(text, in_array)
    if text or in_array:
        raise ValueError("the last value has no end")


def _whole_values(text: str, in_array: bool) -> Generator[object, None, tuple[str, bool]]:
    """The values at the beginning of `text`; returns what follows the last of them, and if that is in an array.

    Raises:
        ValueError, RecursionError: as `json_values`.
    """
    at = 0
    while at < len(text):
        if text[at] in BETWEEN:
            at += 1
        elif text[at] == ("]" if in_array else "["):
            at, in_array = at + 1, not in_array
        else:
            try:
                value, at = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if text[error.pos :].strip():
                    raise
                return text[at:], in_array
            yield value
    return "", in_array


def _no_object(dataset: HubDataset, number: int) -> InvalidDataset:
    hint = "write one JSON object on each line, or an array of them"
    return InvalidDataset(f"row {number} is not a JSON object", field="dataset", value=dataset.id, hint=hint)
