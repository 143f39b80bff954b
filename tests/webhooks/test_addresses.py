"""Addresses that webhooks may go to, against the registries' own lists."""

from ipaddress import ip_address

import pytest

from app.domain.webhooks.addresses import Allowed, checked_url, is_public, may_reach
from bitwright.errors import InvalidRequest

FORBIDDEN = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9"),
    *("224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::"),
    "2001:0:53aa:64c:0:0:f5ff:fffe",  # Teredo for 10.0.0.1: its last 32 bits, inverted
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_what_is_not_on_the_public_internet_is_told(address: str) -> None:
    found = ip_address(address)
    assert not is_public(found)
    assert not may_reach("hooks.example", found, Allowed())
    assert may_reach("hooks.example", found, Allowed.of(["hooks.example"])), "the operator's own word"


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str) -> None:
    assert may_reach("hooks.example", ip_address(address), Allowed())


def test_a_network_is_allowed_and_nothing_beside_it() -> None:
    allowed = Allowed.of(["10.1.0.0/16", "fd00::/8", "Hooks.Internal"])
    for inside in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::5"):
        assert may_reach("x", ip_address(inside), allowed)
    for outside in ("10.2.0.1", "127.0.0.1", "fe80::1"):
        assert not may_reach("x", ip_address(outside), allowed)
    assert checked_url("http://hooks.internal:8080/a", allowed).port == 8080
    assert checked_url("http://10.1.0.9/a", allowed).hostname == "10.1.0.9"


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/", "ftp://example.org/", "https://", "https:///x", "https://exa mple.org/"),
        *("https://user:pass@example.org/", "https://example.org/#x", "https://127.0.0.1/", "https://[::1]/"),
        *("https://localhost/", "https://x.localhost/", "https://printer.local/", "https://db.internal./"),
        *("https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest", "https://exämple.org/", "https://a:99999/"),
        "https://example.org/" + "x" * 3000,
    ],
)
def test_addresses_that_are_no_receivers_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked_url(url, Allowed())
    assert refused.value.field == "url"
    assert "pass" not in str(refused.value.value)
    assert checked_url("https://example.org:8443/hooks?a=b", Allowed()).port == 8443
