"""Recognition of a full disk among errors of the operating system."""

import errno


def disk_full(error: BaseException) -> bool:
    """True for an OSError by which a disk, or the quota on it, is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
