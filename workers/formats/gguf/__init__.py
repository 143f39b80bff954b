"""The `gguf` format: see `file` for its layout."""

from workers.formats.gguf.file import FORMAT

__all__ = ["FORMAT"]
