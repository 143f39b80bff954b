"""What the source's own README.md says that a result inherits: licence, languages, task. Read as data from a stranger.

Only the front matter's few known keys are looked at, as text, and only values of the form that the Hub takes: what is
longer, deeper or of another form is left out. Nothing else of the card is believed or copied.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

CARD = "README.md"
MAX_BYTES = 64 * 1024
"""Of the front matter: PyYAML reads that in under a second."""
MAX_LANGUAGES = 200
BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,9}")
LANGUAGE = re.compile(r"[A-Za-z]{2,20}(-[A-Za-z0-9]{1,8}){0,3}")
URL = re.compile(r"https?://[^\s<>\"'`]{1,500}")
FILE = re.compile(r"(?:\./)?([A-Za-z0-9][A-Za-z0-9._-]{0,99})")


@dataclass(frozen=True)
class SourceCard:
    """The fields by the names that the Hub gives them; empty or None where the card says nothing usable.

    license_link   an address, or the name of a file in the repository
    """

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None

    def link(self, model_id: str | None, copied: bool) -> str | None:
        """The licence's address from the result's side, None where it would lead nowhere.

        model_id   of the source on the Hub, if it is there
        copied     whether the file that `license_link` names lies beside the result's card
        """
        if self.license_link is None or copied or URL.fullmatch(self.license_link):
            return self.license_link
        return f"https://huggingface.co/{model_id}/blob/main/{self.license_link}" if model_id else None


def read_source_card(folder: Path) -> SourceCard:
    """Of the checkpoint in `folder`; an empty one where there is no card, or none that can be read."""
    try:
        with (folder / CARD).open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", "ignore").removeprefix("\ufeff")
    except OSError:
        return SourceCard()
    block = BLOCK.match(text)
    if block is None:
        return SourceCard()
    try:
        # Knows no types but text, list and dict: YAML would make False of Norwegian (no), and dates of versions.
        found = yaml.BaseLoader(block[1].replace("\t", "  ")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return SourceCard()
    return _card(found) if isinstance(found, dict) else SourceCard()


def _card(found: dict[object, object]) -> SourceCard:
    links = (_one(found.get("license_link"), URL), _one(found.get("license_link"), FILE))
    return SourceCard(
        license=_several(found.get("license"), WORD),
        license_name=_one(found.get("license_name"), WORD),
        license_link=links[0] or (links[1].removeprefix("./") if links[1] else None),
        language=_several(found.get("language"), LANGUAGE),
        pipeline_tag=_one(found.get("pipeline_tag"), TASK),
    )


def _one(value: object, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _several(value: object, form: re.Pattern[str]) -> tuple[str, ...]:
    """One value or a list of them, those that are not of the form left out."""
    values = value[:MAX_LANGUAGES] if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in (_one(entry, form) for entry in values) if text))
