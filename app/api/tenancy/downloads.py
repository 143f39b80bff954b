"""A download in the audit log, before its first byte is sent, and its bytes in the tenant's use."""

from app.api.tenancy.admission import actor
from app.api.tenancy.later import WrittenLater
from app.domain.access import Principal
from app.store.session import Database
from app.store.tenancy.audit import record


def note_download(
    later: WrittenLater, database: Database, principal: Principal, action: str, subject: str, size: int
) -> None:
    """Note that a caller gets `size` bytes of the subject now. Ranges of one file are one entry.

    Raises:
        Unavailable: the entry cannot be written, so that nothing may be sent.
    """
    if later.is_news(principal.key_id, f"{action} {subject}"):
        with database.transaction() as session:
            record(session, actor(principal), action, subject)
    later.note_download(principal.tenant_id, size)
