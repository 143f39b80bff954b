"""Use by tenant and month: jobs, time of devices, bytes, and money where the service has a price.

An attempt is counted when it ends, by the price when it began, unless it ended by a fault of the service.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.store.clock import now
from app.store.models import Attempt, UsageMonth
from app.store.upsert import upsert
from bitwright.errors import ERRORS, BitwrightError, PlatformError
from bitwright.job_states import DeviceClass, JobStatus
from bitwright.money import Money
from bitwright.tenancy import MonthView

MICROS = 1_000_000
HOUR = 3600.0
CURRENCY = "USD"
"""The one of a service that names no other."""


def add_usage(session: Session, tenant_id: str, **amounts: float) -> None:
    """Add to columns of the tenant's present month, by name."""
    month = session.scalars(select(now())).one().strftime("%Y-%m")
    columns = UsageMonth.__table__.columns
    more = {name: func.coalesce(columns[name], 0) + amount for name, amount in amounts.items()}
    first = {"jobs": 0, "gpu_seconds": 0.0, "cpu_seconds": 0.0, "cost_micros": None}
    first |= dict.fromkeys(("uploaded_bytes", "stored_bytes", "downloaded_bytes"), 0)
    statement = upsert(session, UsageMonth).values(tenant_id=tenant_id, month=month, **(first | amounts))
    session.execute(statement.on_conflict_do_update(index_elements=["tenant_id", "month"], set_=more))


def count_attempt(session: Session, job_id: str, number: int) -> None:
    """Add the time of an attempt that has just ended."""
    attempt = session.scalars(
        select(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number == number)
        .execution_options(populate_existing=True)
    ).one_or_none()
    seconds = 0.0 if attempt is None or attempt.finished_at is None else device_seconds(attempt, attempt.finished_at)
    if attempt is None or not seconds:
        return
    column = "gpu_seconds" if attempt.device_class == DeviceClass.CUDA else "cpu_seconds"
    price = attempt.price_micros
    money = {} if price is None else {"cost_micros": cost_micros(seconds, price)}
    add_usage(session, attempt.tenant_id, **{column: seconds}, **money)


def device_seconds(attempt: Attempt, until: datetime) -> float:
    """Seconds of an attempt times its devices; 0 if it ended by a fault of the service, or was given back."""
    if attempt.status is JobStatus.QUEUED or not is_counted(attempt.error):
        return 0.0
    return max((until - attempt.started_at).total_seconds(), 0.0) * (attempt.devices or 1)


def is_counted(error: object) -> bool:
    """True if an attempt that ended with this stored error, or with none, is the tenant's own."""
    code = error.get("code") if isinstance(error, dict) else None
    return not issubclass(ERRORS.get(str(code), BitwrightError), PlatformError)


def cost_micros(seconds: float, price_micros: int) -> int:
    """Millionths of the currency for so many seconds of a device, at a price for an hour."""
    return round(seconds * price_micros / HOUR)


def job_cost(session: Session, job_id: str, currency: str) -> Money | None:
    """Cost of a job's attempts until now; None if none had a price."""
    at = session.scalars(select(now())).one()
    attempts = session.scalars(select(Attempt).where(Attempt.job_id == job_id, Attempt.price_micros.is_not(None))).all()
    if not attempts:
        return None
    costs = (cost_micros(device_seconds(a, a.finished_at or at), a.price_micros or 0) for a in attempts)
    return money(sum(costs), currency)


def money(micros: int, currency: str) -> Money:
    """So many millionths as an amount."""
    return Money(amount=f"{micros // MICROS}.{micros % MICROS:06d}", currency=currency)


def months_of(session: Session, tenant_id: str, currency: str, limit: int = 24) -> Sequence[MonthView]:
    """The tenant's months, newest first."""
    query = select(UsageMonth).where(UsageMonth.tenant_id == tenant_id).order_by(UsageMonth.month.desc()).limit(limit)
    return [
        MonthView(
            month=row.month,
            jobs=row.jobs,
            gpu_seconds=round(row.gpu_seconds, 3),
            cpu_seconds=round(row.cpu_seconds, 3),
            uploaded_bytes=row.uploaded_bytes,
            stored_bytes=row.stored_bytes,
            downloaded_bytes=row.downloaded_bytes,
            cost=None if row.cost_micros is None else money(row.cost_micros, currency),
        )
        for row in session.scalars(query.execution_options(populate_existing=True))
    ]
