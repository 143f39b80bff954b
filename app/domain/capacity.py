"""Estimates of a job against what a machine has: refused only where they are too large by far."""

from collections.abc import Mapping
from typing import Any

SIZES = {
    "host_memory_bytes": "memory",
    "device_memory_bytes": "GPU memory",
    "disk_bytes": "free disk",
}
"""Name in a worker's capacity and in the estimates -> word for people."""
MARGIN = 2.0
"""Estimates are right within a factor of about two."""
GIB = 1 << 30


def too_small(estimates: Mapping[str, Any], capacity: Mapping[str, Any]) -> str | None:
    """The shortage of a worker by more than the margin; None if nothing is short, or if it does not report it."""
    host, device = capacity.get("host_memory_bytes"), capacity.get("device_memory_bytes")
    available = {
        # Activations lie in either.
        "host_memory_bytes": host and host + (device or 0),
        "device_memory_bytes": device,
        # Free disk changes while a worker lives; the disk does not.
        "disk_bytes": capacity.get("disk_total_bytes"),
    }
    for name, have in available.items():
        needed = estimates.get(name)
        if isinstance(have, int) and needed is not None and needed > MARGIN * have:
            word = SIZES[name].removeprefix("free ")
            return f"it needs about {needed / GIB:.1f} GiB of {word}, and {have / GIB:.1f} GiB is what there is"
    return None
