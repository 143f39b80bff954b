"""Flags of service commands as BITWRIGHT_* variables: this process and its children then read the same settings."""

import os
from collections.abc import Mapping
from pathlib import Path

import typer
from pydantic import ValidationError

from app.settings import Settings, get_settings


def use_data_dir(data_dir: Path | None) -> Settings:
    """Settings with this data folder; the environment's own if None."""
    return apply({"data_dir": data_dir})


def apply(flags: Mapping[str, object]) -> Settings:
    """Put the flags that are not None into the environment, and read the settings again.

    Raises:
        typer.BadParameter: a flag or a variable is not valid.
    """
    for name, value in flags.items():
        if value is not None:
            os.environ[f"BITWRIGHT_{name.upper()}"] = str(value)
    get_settings.cache_clear()
    try:
        return get_settings()
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise typer.BadParameter(f"settings: {problems}") from error
