"""Flags of service commands as BITWRIGHT_* variables: this process and its children then read the same settings."""

import os
from collections.abc import Mapping
from pathlib import Path

from app.settings import Settings, get_settings


def use_data_dir(data_dir: Path | None) -> Settings:
    """Settings with this data folder; the environment's own if None."""
    return apply({"data_dir": data_dir})


def apply(flags: Mapping[str, object]) -> Settings:
    """Put the flags that are not None into the environment, and read the settings again.

    Raises:
        InvalidSettings: a flag or a variable is not valid.
    """
    for name, value in flags.items():
        if value is not None:
            os.environ[f"BITWRIGHT_{name.upper()}"] = str(value)
    get_settings.cache_clear()
    return get_settings()
