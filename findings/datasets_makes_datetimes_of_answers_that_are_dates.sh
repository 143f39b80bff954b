#!/usr/bin/env bash
# datasets 5.2.0: a column of JSON strings in which every value looks like a point in time ("2026-11-30T10:00:00Z") is loaded as timestamps.
# Rows then hold naive datetimes: the zone and the way of writing are gone, a chat template prints another text than the file has, and
# json.dumps of a row is a TypeError. One guesses that a JSON string stays a string, as the same strings do from CSV, and as these do as
# soon as one row of the column is no date. It happens inside of lists of messages, too, and fine-tuning on extraction of dates meets it.
#
# Needs a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile datasets==5.2.0
cat > "$folder/try.py" <<'PYTHON'
import csv
import json
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset

folder = Path(sys.argv[1])
print("datasets", version("datasets"))
dates = [f"2026-11-{day:02}T10:00:00Z" for day in range(1, 31)]


def first(kind: str, name: str) -> dict:
    rows = load_dataset(kind, data_files=str(folder / name), split="train", cache_dir=str(folder / "cache"))
    print(f"{name}: {rows.features['completion']!r}, {rows[0]['completion']!r}")
    return rows[0]


def write(name: str, values: list) -> None:
    rows = [{"prompt": f"When was {n}?", "completion": value} for n, value in enumerate(values)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


write("dates.jsonl", dates)
write("dates_and_one_word.jsonl", [*dates, "never"])
write("messages.jsonl", [[{"role": "assistant", "content": date}] for date in dates])
with (folder / "dates.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("prompt", "completion"), *((f"When was {n}?", date) for n, date in enumerate(dates))])

alone = first("json", "dates.jsonl")["completion"]
mixed = first("json", "dates_and_one_word.jsonl")["completion"]
inside = first("json", "messages.jsonl")["completion"][0]["content"]
table = first("csv", "dates.csv")["completion"]
print("as text:", dates[0], "->", alone)
if not (alone == inside == datetime(2026, 11, 1, 10) and mixed == table == dates[0]):
    sys.exit("the behaviour has changed")
PYTHON
HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" "$folder/try.py" "$folder"
