"""Licence, languages and task that a result inherits from its source's README.md, read as data from a stranger.

Only a few known keys of the front matter are read, as text, and only values of the form that the Hub takes: longer,
deeper or other values are left out. Nothing else of the card is trusted or copied.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

CARD = "README.md"
MAX_BYTES = 64 * 1024
"""Size limit of the front matter: PyYAML reads that in under a second."""
MAX_LANGUAGES = 200
BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,9}")
LANGUAGE = re.compile(r"[A-Za-z]{2,20}(-[A-Za-z0-9]{1,8}){0,3}")
URL = re.compile(r"https?://[^\s<>\"'`]{1,500}")
FILE = re.compile(r"(?:\./)?([A-Za-z0-9][A-Za-z0-9._-]{0,99})")


@dataclass(frozen=True)
class SourceCard:
    """The fields by the names that the Hub gives them; empty or None if the card has nothing usable.

    license_link   an address, or the name of a file in the repository
    """

    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None

    def link(self, model_id: str | None, copied: bool) -> str | None:
        """The licence's address from the result's side, None if it would lead nowhere.

        model_id   id of the source on the Hub, if it is there
        copied     whether the file that `license_link` names lies beside the result's card
        """
        if self.license_link is None or copied or URL.fullmatch(self.license_link):
            return self.license_link
        return f"https://huggingface.co/{model_id}/blob/main/{self.license_link}" if model_id else None


def read_source_card(folder: Path) -> SourceCard:
    """The card of the checkpoint in `folder`; an empty one if there is no card, or none that can be read."""
    try:
        with (folder / CARD).open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", "ignore").removeprefix("\ufeff")
    except OSError:
        return SourceCard()
    block = BLOCK.match(text)
    if block is None:
        return SourceCard()
    try:
        # BaseLoader has no types but text, list and dict: YAML reads Norwegian (no) as False, and versions as dates.
        fields = yaml.BaseLoader(block[1].replace("\t", "  ")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return SourceCard()
    return _card(fields) if isinstance(fields, dict) else SourceCard()


def _card(fields: dict[object, object]) -> SourceCard:
    links = (_one(fields.get("license_link"), URL), _one(fields.get("license_link"), FILE))
    return SourceCard(
        license=_several(fields.get("license"), WORD),
        license_name=_one(fields.get("license_name"), WORD),
        license_link=links[0] or (links[1].removeprefix("./") if links[1] else None),
        language=_several(fields.get("language"), LANGUAGE),
        pipeline_tag=_one(fields.get("pipeline_tag"), TASK),
    )


def _one(value: object, form: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and form.fullmatch(value) else None


def _several(value: object, form: re.Pattern[str]) -> tuple[str, ...]:
    """One value or a list of values, without those that do not match the form."""
    values = value[:MAX_LANGUAGES] if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in (_one(entry, form) for entry in values) if text))
