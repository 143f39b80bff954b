"""Limits, times and transitions as the documentation has them: literals, so that a change is a decision."""

from importlib import import_module
from warnings import catch_warnings, simplefilter

import pytest
from sqlalchemy import MetaData, create_engine
from sqlalchemy.exc import SAWarning

from app.domain.job_states import TRANSITIONS
from app.store.endings import back_off
from app.store.models import Base

CONSTANTS: dict[str, dict[str, object]] = {
    "blobs": {"CHUNK": 1_048_576},
    "endings": {"BACK_OFF_SECONDS": 1.0, "MAX_BACK_OFF_SECONDS": 60.0, "SMALLER_DIVISOR": 2},
    "events": {"MAX_PAGE": 1000, "CURSORS_A_QUERY": 200},
    "upkeep.garbage": {"GRACE_SECONDS": 86_400.0, "HASHES_A_QUERY": 500},
    "hub.publications": {"MOST_ATTEMPTS": 8, "FIRST_WAIT_SECONDS": 15.0, "LONGEST_WAIT_SECONDS": 3600.0},
    "idempotency": {"KEPT_SECONDS": 86_400},
    "ids": {"ALPHABET": "0123456789abcdefghjkmnpqrstvwxyz", "RANDOM_BITS": 80},
    "jobs": {"MAX_PAGE": 1000},
    "tenancy.hub_tokens": {"JOB_TOKEN_SECONDS": 2_592_000.0},
    "tenancy.keys": {"SHOWN": 8},
    "session": {"BUSY_SECONDS": 30, "SCHEMA_LOCK": 1_651_078_263},
    "status": {"NOT_RUNNING": {"worker_id": None, "lease_expires_at": None}},
    "uploads": {"OPEN_SECONDS": 86_400, "MAX_FILES": 1024, "MAX_NAME": 255},
    "waiting": {"LONGEST_QUEUE": 1000, "MEASURED_JOBS": 200},
    "workers": {"FRESH_SECONDS": 90.0, "CLOCK_READINGS": 3},
}


@pytest.mark.parametrize("module", CONSTANTS)
def test_a_constant_is_what_it_is_said_to_be(module: str) -> None:
    known = vars(import_module(f"app.store.{module}"))
    assert {name: known[name] for name in CONSTANTS[module]} == CONSTANTS[module]


def test_a_fault_waits_two_seconds_then_twice_as_long_each_time_up_to_a_minute() -> None:
    assert [back_off(attempts) for attempts in range(1, 9)] == [2, 4, 8, 16, 32, 60, 60, 60]


def test_the_transitions_of_a_job() -> None:
    assert {origin.value: sorted(targets) for origin, targets in TRANSITIONS.items()} == {
        "queued": ["cancelled", "running"],
        "running": ["cancelled", "failed", "queued", "succeeded"],
        "succeeded": [],
        "failed": ["queued"],
        "cancelled": ["queued"],
    }


OWNED = {
    "api_key": {"tenant"},
    "page_session": {"api_key", "tenant"},
    "artifact": {"tenant", "job"},
    "attempt": {"tenant", "job"},
    "audit": set(),
    "event": {"tenant", "job"},
    "fine_tuning_job": {"tenant", "job"},
    "hub_token": {"tenant", "job"},
    "idempotency_key": {"tenant", "job", "upload"},
    "job": {"tenant"},
    "job_label": {"tenant", "job"},
    "kept_file": {"tenant", "job"},
    "job_name": {"tenant", "job"},
    "job_upload": {"tenant", "job", "upload"},
    "publication": {"tenant", "job"},
    "rate_window": {"tenant"},
    "sweep_lease": set(),
    "tenant": set(),
    "upload": {"tenant"},
    "upload_file": {"tenant", "upload"},
    "usage_month": {"tenant"},
    "webhook_attempt": {"tenant", "webhook_delivery"},
    "webhook_delivery": {"tenant", "webhook_endpoint"},
    "webhook_endpoint": {"tenant"},
    "worker": set(),
}


def test_every_row_goes_with_its_owner() -> None:
    assert _owners(Base.metadata) == OWNED


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_the_migrated_schema_has_the_same_owners(sqlite_url: str) -> None:
    engine, found = create_engine(sqlite_url), MetaData()
    with catch_warnings():
        simplefilter("ignore", SAWarning)  # of indexes on expressions, which are of no interest here
        found.reflect(engine)
    engine.dispose()
    assert {name: owners for name, owners in _owners(found).items() if name != "alembic_version"} == OWNED


def _owners(tables: MetaData) -> dict[str, set[str]]:
    """Each table's references that end a row with the row it refers to."""
    return {
        name: {key.referred_table.name for key in table.foreign_key_constraints if key.ondelete == "CASCADE"}
        for name, table in tables.tables.items()
    }
