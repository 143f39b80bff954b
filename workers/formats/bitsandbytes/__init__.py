"""The `bitsandbytes` format: four-bit NormalFloat; see `workers.formats.bitsandbytes.checkpoint`."""

from workers.formats.bitsandbytes.checkpoint import FORMAT

__all__ = ["FORMAT"]
