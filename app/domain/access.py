"""Access rights: the scopes of an API key and the principal that a key stands for."""

from dataclasses import dataclass, field
from enum import StrEnum

from bitwright.tenancy import Quotas


class Scope(StrEnum):
    """Scope of a key. Each scope includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """The owner of a valid key."""

    tenant_id: str
    key_id: str
    scopes: frozenset[Scope]
    quotas: Quotas = field(default_factory=Quotas)
    """The tenant's own, without the service's defaults."""

    def allows(self, needed: Scope) -> bool:
        """True if one of the scopes is, or includes, `needed`."""
        order = list(Scope)
        return any(order.index(scope) >= order.index(needed) for scope in self.scopes)
