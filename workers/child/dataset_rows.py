"""Rows of a dataset of the Hub, with their strings as its files have them.

The reader of JSON in `datasets` infers types by pyarrow, which takes a column for points in time where every string of
the first megabytes looks like one: answers that are dates come as datetimes, without zone and way of writing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from app.domain.request.sources import HubDataset
from bitwright.errors import InvalidDataset

TEMPORAL = ("timestamp", "date", "time", "duration")


def dataset_rows(dataset: HubDataset, commit: str, columns: Iterable[str]) -> Iterable[Mapping[str, object]]:
    """Rows of a split at a commit, read as they are asked for; values of `columns` are not inferred to be times.

    Raises:
        ValueError: no such configuration or split, or a file that is no table.
        InvalidDataset: a line of a file of JSON lines is no JSON object.
    """
    from datasets import load_dataset  # noqa: PLC0415 (takes a second, and most jobs need it not)

    rows = load_dataset(dataset.id, dataset.config, split=dataset.split, revision=commit, streaming=True)
    features = rows.features or {}
    inferred = [name for name in columns if name in features and is_temporal(features[name])]
    return _as_written(dataset, commit) or rows if inferred else rows


def is_temporal(feature: Any) -> bool:
    """True if values of a feature of `datasets`, or some inside of them, are points or spans of time."""
    if isinstance(feature, Mapping):
        return any(map(is_temporal, feature.values()))
    if isinstance(feature, list):
        return any(map(is_temporal, feature))
    inner = getattr(feature, "feature", None)
    return str(getattr(feature, "dtype", "")).startswith(TEMPORAL) or (inner is not None and is_temporal(inner))


def _as_written(dataset: HubDataset, commit: str) -> Iterator[Mapping[str, object]] | None:
    """Rows of the split's files of JSON lines; None where it is another format, whose types are its own."""
    from datasets import load_dataset, load_dataset_builder  # noqa: PLC0415
    from datasets.packaged_modules.json.json import Json  # noqa: PLC0415

    builder = load_dataset_builder(dataset.id, dataset.config, revision=commit)
    files = dict(builder.config.data_files or {}).get(dataset.split)
    if not isinstance(builder, Json) or not files:
        return None
    lines = load_dataset("text", data_files={"all": list(files)}, split="all", streaming=True)
    first = next(iter(lines), {"text": ""})["text"]
    return None if first.lstrip().startswith("[") else _objects(dataset, lines)


def _objects(dataset: HubDataset, lines: Iterable[Mapping[str, str]]) -> Iterator[Mapping[str, object]]:
    for number, line in enumerate(lines, 1):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except ValueError as error:
            raise _no_object(dataset, number) from error
        if not isinstance(row, dict):
            raise _no_object(dataset, number)
        yield row


def _no_object(dataset: HubDataset, number: int) -> InvalidDataset:
    hint = "write one JSON object on each line"
    return InvalidDataset(f"row {number} is not a JSON object", field="dataset", value=dataset.id, hint=hint)
