"""Times of the database's clock, as Python and SQL see them; and documents that JSON can hold."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import BaseModel
from sqlalchemy import select, update

from app.store.clock import now, seconds_from_now
from app.store.documents import document
from app.store.models import Tenant
from app.store.session import Database
from bitwright.errors import NumericalFailure


@pytest.mark.parametrize("seconds", [0.0, 0.25, 1.5, 90.0, 86_400.0 * 400, -0.25, -3600.0])
def test_a_time_from_now_is_so_many_seconds_off(database: Database, seconds: float) -> None:
    with database.reading() as session:
        at, then = session.execute(select(now(), seconds_from_now(seconds))).one()
    assert abs((then - at).total_seconds() - seconds) < 0.05
    assert (at.utcoffset(), then.utcoffset()) == (timedelta(0), timedelta(0))
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60


def test_the_times_of_one_statement_are_one_time(database: Database) -> None:
    with database.reading() as session:
        first, second = session.execute(select(now(), seconds_from_now(0))).one()
    assert first == second


def test_a_stored_time_is_the_same_moment_and_a_naive_one_is_refused(database: Database, tenant: str) -> None:
    moment = datetime(2026, 3, 29, 2, 30, 0, 123_456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with database.transaction() as session:
        session.execute(update(Tenant).values(created_at=moment))
    with database.reading() as session:
        stored = session.get_one(Tenant, tenant).created_at
        earlier, later = (moment - timedelta(microseconds=1), moment + timedelta(microseconds=1))
        between = (Tenant.created_at > earlier, Tenant.created_at < later)
        assert session.scalars(select(Tenant.id).where(*between)).all() == [tenant]
    assert stored == moment
    assert stored.tzinfo is UTC
    with pytest.raises(Exception, match="without a zone"), database.transaction() as session:
        session.execute(update(Tenant).values(created_at=datetime(2026, 1, 1)))


class Inner(BaseModel):
    values: list[float]
    by_name: dict[str, float]


class Message(BaseModel):
    inner: Inner
    many: list[Inner]


@pytest.mark.parametrize(
    ("values", "by_name", "path"),
    [([1.0, float("nan")], {}, "many.1.values.1"), ([], {"a": float("-inf")}, "many.1.by_name.a")],
)
def test_a_number_that_json_has_not_is_named_where_it_stands(
    values: list[float], by_name: dict[str, float], path: str
) -> None:
    good = Inner(values=[1.5], by_name={"x": 0.0})
    assert document(Message(inner=good, many=[])) == {"inner": {"values": [1.5], "by_name": {"x": 0.0}}, "many": []}
    with pytest.raises(NumericalFailure) as caught:
        document(Message(inner=good, many=[good, Inner(values=values, by_name=by_name)]))
    assert caught.value.field == path
