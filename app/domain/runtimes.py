"""A runtime that loads a format: its limits, the release that they come from, and whether a test tried them.

A runtime is `tested` where a test or benchmark of this repository loads the artifact in it, else `by_rules`: the
runtime's own limits as its source has them, which a test encodes. Either way the row names the release: limits move,
and a table without releases goes stale unseen. A runtime whose limits depend on the device has a row for each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from app.domain.methods import PER_CHANNEL, SCHEMES, Scheme, SchemeName


class Runtime(StrEnum):
    """The runtimes that a worker may have, and in which it tries what it makes."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"
    VLLM = "vllm"
    PEFT = "peft"


ONLY_WHERE_ASKED = frozenset({Runtime.VLLM})
"""Runtimes that take so long to start that they read a result only where a request names them."""


class Support(StrEnum):
    TESTED = "tested"
    BY_RULES = "by_rules"


@dataclass(frozen=True)
class WidthsSince:
    """Widths that a runtime, or a library that it needs, has taken since one of its releases."""

    version: str
    bits: frozenset[int]
    symmetric: frozenset[bool] = frozenset({True, False})

    def holds(self, scheme: Scheme) -> bool:
        return scheme.name is None and scheme.bits in self.bits and scheme.symmetric in self.symmetric


@dataclass(frozen=True)
class RuntimeSupport:
    """A runtime that loads a format, for which schemes, on which devices, and how we know."""

    runtime: str
    support: Support
    bits: frozenset[int]
    group_sizes: frozenset[int] | None = None
    """None: any group size."""
    asymmetric_bits: frozenset[int] | None = None
    """Widths that it loads with zero points; None: all of `bits`."""
    note: str = ""
    version: str = ""
    """The release that a test loaded the format in, or whose source the rules were read in."""
    devices: str = ""
    """The devices that this row speaks of; empty: all that the runtime runs on."""
    smallest_group: int = 1
    group_multiple: int = 1
    """Groups are multiples of so many columns; per channel is a case of its own."""
    fused: tuple[tuple[str, ...], ...] = ()
    """Last names of linears that it runs as one, and so needs in one scheme."""
    since: tuple[WidthsSince, ...] = ()
    """Widths that earlier releases did not take."""
    schemes: frozenset[SchemeName] = frozenset()
    """Schemes by name that it loads, whatever the limits of integers."""
    embeddings: frozenset[int] | None = None
    """Widths of symmetric integers in which it looks rows of packed embeddings up; None: of all that it loads."""

    def loads(self, scheme: Scheme) -> bool:
        """True if a linear in this scheme is within the runtime's limits."""
        if scheme.name is not None:
            return scheme.name in self.schemes
        bits = self.bits if scheme.symmetric or self.asymmetric_bits is None else self.asymmetric_bits
        return scheme.bits in bits and self._takes_group(scheme.group_size)

    def looks_up(self, scheme: Scheme) -> bool:
        """True if it runs a model with embeddings in this scheme, packed."""
        own = self.embeddings
        return self.loads(scheme) and (own is None or (scheme.name is None and scheme.symmetric and scheme.bits in own))

    def first_release(self, schemes: Iterable[Scheme]) -> str | None:
        """The oldest release that takes all of them, where the row knows of older ones that do not."""
        versions = {added.version for scheme in schemes for added in self.since if added.holds(scheme)}
        return max(versions, key=_release, default=None)

    def known(self) -> str:
        """Evidence for the support, its release and devices, in words."""
        how = "tested with" if self.support is Support.TESTED else "by the rules of"
        return f"{how} {self.version}" + (f" on {self.devices}" if self.devices else "")

    def _takes_group(self, size: int) -> bool:
        if self.group_sizes is not None:
            return size in self.group_sizes
        return size == PER_CHANNEL or (size >= self.smallest_group and size % self.group_multiple == 0)


def described(scheme: Scheme) -> str:
    """A scheme in words."""
    if scheme.name is not None:
        return f"{scheme.name.value} ({SCHEMES[scheme.name].title})"
    group = "per channel" if scheme.group_size == PER_CHANNEL else f"group size {scheme.group_size}"
    return f"{scheme.bits} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}, {group}"


def runtime_limits(rows: Iterable[RuntimeSupport], what: str, scheme: Scheme, *, embeddings: bool = False) -> list[str]:
    """A sentence for each runtime of these rows that does not load linears of `scheme`, or only on some devices.

    what         the sentence's object
    embeddings   whether it is about embeddings, which a runtime may load and not look rows up in
    """
    by_runtime: dict[str, list[RuntimeSupport]] = {}
    for row in rows:
        by_runtime.setdefault(row.runtime, []).append(row)
    notes = []
    for runtime, known in by_runtime.items():
        able = [row for row in known if (row.looks_up(scheme) if embeddings else row.loads(scheme))]
        unable = "; ".join(row.known() for row in known if row not in able)
        if not able:
            notes.append(f"{runtime} does not load {what} ({unable})")
        elif unable:
            since = able[0].first_release([scheme])
            first = f" from {since} on" if since else ""
            notes.append(f"{runtime} loads {what}{first} ({able[0].known()}), but not everywhere ({unable})")
    return notes


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))
