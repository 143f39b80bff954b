"""The way to the database does to connections what a network does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL

from tests.chaos.link import Link

TABLE = "CREATE TABLE IF NOT EXISTS told (n int)"


@pytest.fixture
def link(postgres: URL) -> Iterator[Link]:
    folder = postgres.query["host"]
    assert isinstance(folder, str)
    with Link(Path(folder) / ".s.PGSQL.5432") as link:
        yield link


def through(link: Link) -> psycopg.Connection:
    return psycopg.connect(host="127.0.0.1", port=link.port, user="postgres", dbname="postgres", connect_timeout=5)


@pytest.mark.slow
def test_an_answer_that_is_lost_was_a_commit_all_the_same(link: Link) -> None:
    with through(link) as setup:
        setup.execute(TABLE)
        setup.execute("DELETE FROM told")
    link.lose_answers(1)
    connection = through(link)
    connection.execute("INSERT INTO told VALUES (1)")
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    connection.close()
    assert link.answers_lost == 1
    with through(link) as after:
        assert after.execute("SELECT n FROM told").fetchall() == [(1,)]


@pytest.mark.slow
def test_a_link_that_is_cut_ends_connections_and_refuses_new_ones(link: Link) -> None:
    connection = through(link)
    link.cut()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()
    with pytest.raises(psycopg.OperationalError):
        through(link)
    link.mend()
    with through(link) as again:
        assert again.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.slow
def test_a_silent_link_delays_and_loses_nothing(link: Link) -> None:
    with through(link) as connection:
        link.silence()
        threading.Timer(1.0, link.mend).start()
        began = time.monotonic()
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert time.monotonic() - began > 0.9
