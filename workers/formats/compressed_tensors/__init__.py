"""The `compressed-tensors` format: see `tensors` for its layout."""

from workers.formats.compressed_tensors.checkpoints import FORMAT
from workers.formats.compressed_tensors.configuration import config, needs_loader, unpacks_on_load
from workers.formats.compressed_tensors.loading import package_needed, package_warnings
from workers.formats.compressed_tensors.tensors import compress, decompress

__all__ = [
    "FORMAT",
    "compress",
    "config",
    "decompress",
    "needs_loader",
    "package_needed",
    "package_warnings",
    "unpacks_on_load",
]
