"""Confinement of an attempt's process from its birth on, by itself: everything here is lost for good.

    privileges  no program that it starts gains any
    network     one of its own with nothing but its loopback, where the kernel gives one; else no internet sockets
    user        another than root's, where the worker is root and its operator has named one
    files       none grows beyond what a checkpoint is; so many are open; no core is dumped
    processor   as much as all processors give in the longest attempt there is
    memory      what its job's plan says, once it has one (`limit_to_plan`)

The ranks of a job talk to each other, so that they share the network of the first: it writes down what it has.
"""

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from app.limited.launch import CLONE_NEWNET, CLONE_NEWUSER, PR_SET_NO_NEW_PRIVS, enter_namespaces, leave_network
from app.limited.own_limits import limit_files, limit_memory, limit_processor

NETWORK, USER = "BITWRIGHT_ATTEMPT_NETWORK", "BITWRIGHT_ATTEMPT_USER"
"""Variables of an attempt: one of the words below; the number of a user."""
OWN, FILTERED, JOINED, SHARED = "own", "filtered", "joined", "shared"
PR_SET_DUMPABLE = 4
OPEN_FILES = 65_536
FILE_BYTES = 8 << 40
FILE_TIMES, FILE_BYTES_BESIDE = 8, 16 << 30
"""Of the weights' files, and besides: numbers of 4 bits may become 32."""
PROCESSOR_SECONDS = 30 * 86_400
JOIN_SECONDS = 30.0
LOOK_AGAIN_SECONDS = 0.02


def confine(workspace: Path | None, rank: int) -> None:
    """Confine this process as its environment says; call it while it has one thread.

    workspace   of the job, in which ranks find each other; None: there is no job yet, and only one rank

    Raises:
        OSError: it is to run as another user, and cannot.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError):  # a kernel that gives no namespace and takes no filter
        _leave_network(os.environ.get(NETWORK, SHARED), workspace, rank)
    user = os.environ.get(USER)
    if user is not None and os.getuid() == 0:
        become(int(user))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    limit_files(FILE_BYTES, OPEN_FILES)
    limit_processor(PROCESSOR_SECONDS * (os.cpu_count() or 1))


def limit_to_plan(memory_bytes: int, mapped_bytes: int) -> None:
    """Let this process allocate what its job's plan needs, and map its files besides, of which copies are private; and
    let no file that it writes be larger than what can be made of them.
    """
    limit_memory(memory_bytes + mapped_bytes)
    limit_files(FILE_TIMES * mapped_bytes + FILE_BYTES_BESIDE, OPEN_FILES)


def become(user: int) -> None:
    """Go on as another user, in no group but the one of the same number."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    # Else the files of this process in /proc stay root's, and it cannot say that it may be ended first.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def _leave_network(how: str, workspace: Path | None, rank: int) -> None:
    # Root in a namespace of users may read less than before: files of others, which it reads where it is.
    of_user = os.getuid() != 0
    if how == OWN:
        leave_network(of_user=of_user)
    elif how == FILTERED:
        leave_network(namespaces=False)
    elif how == JOINED and workspace is not None:
        place = workspace / f"network-{os.environ['BITWRIGHT_ATTEMPT']}"
        if rank == 0:
            _write(place, str(os.getpid()) if enter_namespaces(of_user=of_user) else "")
        else:
            _join(_read(place))


def _write(place: Path, text: str) -> None:
    unfinished = place.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.rename(place)


def _read(place: Path) -> str:
    until = time.monotonic() + JOIN_SECONDS
    while not place.exists() and time.monotonic() < until:
        time.sleep(LOOK_AGAIN_SECONDS)
    with suppress(OSError):
        return place.read_text()
    return ""


def _join(first: str) -> None:
    """Enter the namespaces of the first rank."""
    if not first:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, flag in (("user", CLONE_NEWUSER), ("net", CLONE_NEWNET)):
        theirs, own = Path(f"/proc/{first}/ns/{kind}"), Path(f"/proc/self/ns/{kind}")
        if os.readlink(theirs) != os.readlink(own):
            descriptor = os.open(theirs, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(descriptor, flag):
                    raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace of {first}")
            finally:
                os.close(descriptor)
