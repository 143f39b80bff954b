"""Hosts as network namespaces of this machine, each with one cable to a switch; a cable can be pulled."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pwd import getpwnam


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own.

    cable   the end of its cable at the switch
    """

    namespace: str
    address: str
    cable: str

    def command(self, words: Sequence[str], user: str | None = None) -> list[str]:
        """The command as the host runs it, as another user if one is named."""
        account = getpwnam(user) if user else None
        drop = (
            ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"] if account else []
        )
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *drop, *words]

    def cut(self) -> None:
        """Pull the cable: nothing is heard from the host, and it hears nothing."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self.cable, "up")


def missing() -> str | None:
    """Reason why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [name for name in ("ip", "nsenter", "setpriv") if shutil.which(name) is None]
    if lacking:
        return f"no {lacking[0]} here (Debian: iproute2, util-linux)"
    name = f"bw{os.getpid()}try"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return "the kernel allows no network namespaces here"
    _ip("netns", "del", name)
    return None


@contextmanager
def network(*names: str) -> Iterator[dict[str, Host]]:
    """A switch of this machine with these hosts on it, by name; this machine is on it, too."""
    tag, net = f"bw{os.getpid() % 100_000}", f"10.203.{os.getpid() % 250}"
    hosts = {
        name: Host(f"{tag}-{name}", f"{net}.{10 + number}", f"{tag}c{number}") for number, name in enumerate(names)
    }
    try:
        _ip("link", "add", tag, "type", "bridge")
        _ip("addr", "add", f"{net}.1/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for host in hosts.values():
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.cable, "master", tag, "up")
            within = ("-n", host.namespace)
            _ip(*within, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*within, "link", "set", "eth0", "up")
            _ip(*within, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts.values():
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", host.namespace)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", tag)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
