"""Pages of a tenant's texts: complete uploads of one JSONL file."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.store.jobs import Page
from app.store.models import Upload, UploadFile
from app.store.openai.fine_tuning import require_cursor
from app.store.uploads import UploadRepository
from bitwright.errors import NotFound

SUFFIX = ".jsonl"


def is_text(upload: Upload) -> bool:
    """True for a complete upload of one JSONL file."""
    return upload.complete and len(upload.files) == 1 and upload.files[0].name.endswith(SUFFIX)


def text_of(session: Session, tenant_id: str, upload_id: str) -> Upload:
    """The upload of a text.

    Raises:
        NotFound: the tenant has no such upload, or it is another kind or not complete.
    """
    upload = UploadRepository(session, tenant_id).get(upload_id)
    if not is_text(upload):
        raise NotFound(f"there is no file {upload_id}: the upload is no text, or not complete", value=upload_id)
    return upload


def texts(session: Session, tenant_id: str, *, after: str | None, limit: int, newest_first: bool) -> Page[Upload]:
    """Up to `limit` texts; `after` is the id of the last one before.

    Raises:
        InvalidRequest: `after` is no id.
    """
    require_cursor("upl", after)
    files = select(func.count()).where(UploadFile.upload_id == Upload.id).scalar_subquery()
    named = select(UploadFile.upload_id).where(UploadFile.upload_id == Upload.id, UploadFile.name.like(f"%{SUFFIX}"))
    query = select(Upload).where(
        Upload.tenant_id == tenant_id, Upload.completed_at.is_not(None), files == 1, named.exists()
    )
    if after is not None:
        query = query.where(Upload.id < after if newest_first else Upload.id > after)
    order = Upload.id.desc() if newest_first else Upload.id.asc()
    rows = session.scalars(query.order_by(order).limit(limit + 1)).all()
    items = rows[:limit]
    return Page(items=items, next_cursor=items[-1].id if len(rows) > limit else None)
