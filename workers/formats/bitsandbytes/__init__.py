"""The `bitsandbytes` format: four-bit NormalFloat; see its `checkpoint`."""

from workers.formats.bitsandbytes.checkpoint import FORMAT

__all__ = ["FORMAT"]
