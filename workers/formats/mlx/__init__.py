"""The `mlx` format: codes in a dense stream with scale and bias for each group; see its `checkpoint`."""

from workers.formats.mlx.checkpoint import FORMAT

__all__ = ["FORMAT"]
