"""Files that are something else than their names say, told by how they begin, with the way out."""

from dataclasses import dataclass

TOLD_BY = 8
"""Bytes that tell all of them apart."""


@dataclass(frozen=True)
class Mistaken:
    """A kind of contents, and what to do."""

    what: str
    hint: str


POINTER = Mistaken(
    "a Git LFS pointer, not the file itself",
    "run `git lfs pull` in the clone, or fetch the repository with `hf download`",
)
PAGE = Mistaken("a web page", "fetch the file again: a wrong link and a gated repository without a token give pages")
ARCHIVE = Mistaken("a zip archive, as torch.save and others write", "unpack it; save weights as safetensors")
BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/v1", POINTER),
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"PK\x03\x04", ARCHIVE),
    (b"\x1f\x8b", Mistaken("a gzip file", "unpack it: gunzip FILE.gz")),
    (b"\x28\xb5\x2f\xfd", Mistaken("a zstd file", "unpack it: zstd -d FILE.zst")),
    (
        b"PAR1",
        Mistaken(
            "a Parquet file",
            "name a dataset of the Hub by its id, or write its rows as JSONL: "
            'datasets.Dataset.from_parquet("rows.parquet").to_json("rows.jsonl")',
        ),
    ),
    (b"GGUF", Mistaken("a GGUF file", "give it the suffix .gguf, in a folder of its own")),
    (b"\xff\xfe", Mistaken("a text in UTF-16", "save it in UTF-8: iconv -f utf-16 -t utf-8")),
)


def mistaken(beginning: bytes) -> Mistaken | None:
    """The kind of a file by its first `TOLD_BY` bytes or more; None where it is none of these."""
    shown = beginning.lstrip().lower() if beginning.lstrip()[:1] == b"<" else beginning
    for begins, kind in BEGINNINGS:
        count = min(len(shown), len(begins))
        if count >= min(TOLD_BY, len(begins)) and shown[:count] == begins[:count]:
            return kind
    return None
