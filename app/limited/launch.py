"""`python -P -m app.limited.launch FILE_BYTES PARENT USER COMMAND...`: confines this process, then becomes COMMAND.

Everything here outlives `exec`, so that any program can be confined, whatever language it is written in:

    network     a network namespace of its own, in which nothing is but its own loopback; where the kernel refuses that,
                a filter of system calls that refuses internet sockets
    lifetime    it ends when PARENT does, the process that started it; 0: nothing is done about that
    files       none that it writes grows beyond FILE_BYTES; no core is dumped
    privileges  no program that it starts gains any; it goes on as the user of number USER, unless that is 0

It imports the standard library alone. Systems other than Linux have none of this but the limits of files.
"""

import ctypes
import fcntl
import os
import platform
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
SECCOMP_MODE_FILTER = 2
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 13
"""Verdicts of a filter: go on; fail with EACCES."""
SOCKET_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Machine -> its number in audits, and that of the system call `socket`."""
EXIT_ORPHANED, EXIT_NOT_FOUND = 76, 127
OPEN_FILES = 1024


def main(arguments: list[str]) -> None:
    """Confine this process and become the command."""
    file_bytes, parent, user = map(int, arguments[:3])
    command = arguments[3:]
    if sys.platform == "linux":
        leave_network()
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # After the namespaces: what changes a process's credentials takes this back.
    if parent:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_ORPHANED)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, most), min(OPEN_FILES, most)))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        os.execvp(command[0], command)  # noqa: S606 - a shell is what nobody wants
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        os._exit(EXIT_NOT_FOUND)


def leave_network(*, namespaces: bool = True, of_user: bool = True) -> None:
    """Go where there is no network but a loopback of one's own; else refuse internet sockets, if the kernel can.

    namespaces   whether one's own is tried first
    of_user      whether one's own users may come along, where that is what it costs

    Raises:
        OSError: the kernel does neither.
    """
    if not (namespaces and enter_namespaces(of_user=of_user)):
        refuse_internet_sockets()


def enter_namespaces(*, of_user: bool = True) -> bool:
    """Go where there is no network but a loopback of one's own; False where the kernel does not let this process."""
    user, group = os.getuid(), os.getgid()
    if _unshare(CLONE_NEWNET):
        _loopback_up()
    elif of_user and _unshare(CLONE_NEWUSER | CLONE_NEWNET):
        with suppress(OSError):  # files keep their owner either way; programs that ask who they are get an answer
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        _loopback_up()
    else:
        return False
    return True


def refuse_internet_sockets() -> None:
    """Let `socket` fail for IPv4 and IPv6 from now on, in this process and all that it starts.

    Raises:
        OSError: the kernel has no such filters, or the machine is of an unknown kind.
    """
    if platform.machine() not in SOCKET_CALLS:
        raise OSError(f"no filter for {platform.machine()}")
    audit, call = SOCKET_CALLS[platform.machine()]
    load, equal, verdict = 0x20, 0x15, 0x06
    program = [
        (load, 0, 0, 4),  # the machine
        (equal, 0, 5, audit),
        (load, 0, 0, 0),  # the call
        (equal, 0, 3, call),
        (load, 0, 0, 16),  # its first argument, the family
        (equal, 2, 0, socket.AF_INET),
        (equal, 1, 0, socket.AF_INET6),
        (verdict, 0, 0, ALLOW),
        (verdict, 0, 0, REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    prepared = Program(len(program), ctypes.addressof(code))
    if _libc().prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(prepared), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _unshare(flags: int) -> bool:
    with suppress(AttributeError):  # Linux's own
        return bool(_libc().unshare(flags) == 0)
    return False


def _loopback_up() -> None:
    """Programs that talk to themselves find their loopback; without it they would hang or fail."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError):
        _libc().prctl(option, value, 0, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    main(sys.argv[1:])
