"""Addresses that a webhook may go to: public ones, and what the operator allows besides."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from bitwright.errors import InvalidRequest

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL = 2048
NAT64 = ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""
SPECIAL = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4"),
            *("64:ff9b:1::/48", "100::/64", "2001::/23", "3fff::/20", "5f00::/16", "fec0::/10"),
        ),
    )
)
"""Networks of IANA's registries of special addresses that not every release of Python tells from public ones."""
LOCAL_NAMES = ("localhost", ".localhost", ".local", ".internal")
"""Names, and ends of names, that are never public."""
WAY_OUT = "give a public https:// address; the operator allows others with BITWRIGHT_WEBHOOK_ALLOWED"


@dataclass(frozen=True)
class Allowed:
    """Hosts and networks that webhooks may go to though they are private, and without TLS."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, words: Iterable[str]) -> "Allowed":
        """Those of a setting's words: names, addresses, and networks as 10.1.0.0/16."""
        networks, hosts = [], set()
        for word in words:
            network = network_of(word)
            if network is None:
                hosts.add(word.lower())
            else:
                networks.append(network)
        return cls(frozenset(hosts), tuple(networks))

    def host(self, host: str) -> bool:
        """True if the host is among them, by its name or as an address."""
        address = address_of(host)
        return host.lower() in self.hosts or (address is not None and self.address(address))

    def address(self, address: Address) -> bool:
        """True if the address lies in one of the networks."""
        return any(address.version == network.version and address in network for network in self.networks)


def network_of(word: str) -> Network | None:
    """The network that a word stands for; of an address, that address alone. None for a name."""
    try:
        return ip_network(word.strip("[]"), strict=False)
    except ValueError:
        return None


def address_of(host: str) -> Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return plain(ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        return None


def plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, by whichever way of writing it so; else the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in NAT64 or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """True for an address of the public internet: none that is private, loopback, link-local, shared or multicast."""
    real = plain(address)
    special = any(real.version == network.version and real in network for network in SPECIAL)
    return real.is_global and not (special or real.is_multicast or real.is_reserved or real.is_unspecified)


def may_reach(host: str, address: Address, allowed: Allowed) -> bool:
    """True if a webhook for this host may connect to this address that its name has now."""
    return is_public(address) or allowed.host(host) or allowed.address(plain(address))


def checked_url(url: str, allowed: Allowed) -> SplitResult:
    """The parts of a webhook's address, as far as it can be judged without asking for its name's addresses.

    Raises:
        InvalidRequest: it is no web address, has a name or password in it, or is not allowed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    ascii_only = url.isascii() and url.isprintable() and " " not in url
    if not ascii_only or len(url) > MAX_URL or parts.scheme not in ("http", "https") or not host or port == 0:
        raise _refusal("this is no web address of up to 2048 ASCII characters", url)
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _refusal("the address has a user, a password or a fragment", "***")
    if allowed.host(host):
        return parts
    if parts.scheme != "https":
        raise _refusal("messages go by https alone", url)
    address, name = address_of(host), host.lower().rstrip(".")
    if (address is not None and not is_public(address)) or name == LOCAL_NAMES[0] or name.endswith(LOCAL_NAMES[1:]):
        raise _refusal(f"{host} is not on the public internet", url)
    return parts


def _refusal(detail: str, url: str) -> InvalidRequest:
    return InvalidRequest(detail, field="url", value=url, hint=WAY_OUT)
