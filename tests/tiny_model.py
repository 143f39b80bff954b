"""The tiny trained model of `workers.tiny_model`, trained once and kept between runs."""

import fcntl
import os
from pathlib import Path

from workers.tiny_model import content_key, make_tiny_model

CACHE = Path(__file__).parent.parent / ".cache"


def tiny_model_folder() -> Path:
    """The trained checkpoint's folder, under BITWRIGHT_TEST_CACHE or .cache; trained if it is not there.

    One process trains it and others wait. Its name holds the hash of the code and text that it comes from, so that a
    stale one is never found.
    """
    cache = Path(os.environ.get("BITWRIGHT_TEST_CACHE", CACHE))
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"tiny-{content_key()}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_tiny_model(folder)
