"""A table in place of JSONL is told as one, and what the error says to do gives its rows."""

import csv
import io
import json
import re

import pytest

from app.domain.inputs.jsonl import numbered_records
from app.domain.inputs.rows import PlainText
from bitwright.errors import InvalidDataset


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_way_out_of_a_table_gives_its_rows(separator: str, mark: str) -> None:
    texts = [f'a "quoted"{separator} text\nof two lines', "another"]
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=separator).writerows([["id", "text"], *enumerate(texts)])
    with pytest.raises(InvalidDataset, match="is a table of columns") as caught:
        list(numbered_records(io.BytesIO((mark + table.getvalue()).encode()), "calibration.dataset"))
    found = re.search(r'from_csv\("rows\.csv"(?:, sep=\'(.+)\')?\)', str(caught.value.hint))
    assert found is not None
    told = (found[1] or ",").replace("\\t", "\t")
    rows = csv.DictReader(io.StringIO(table.getvalue(), newline=""), delimiter=told)  # as `from_csv` reads them
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert [each.row for each in numbered_records(io.BytesIO(lines.encode()), "rows")] == [PlainText(t) for t in texts]


def test_prose_is_no_table() -> None:
    with pytest.raises(InvalidDataset, match="line 1 is not JSON"):
        list(numbered_records(io.BytesIO(b"some text, and more of it\n"), "calibration.dataset"))
