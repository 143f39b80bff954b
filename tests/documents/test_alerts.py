"""The example alert rules name metrics and labels that the service has, and each says what to do."""

import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from app.api.metrics import Metrics
from app.api.tenancy.store_gauges import StoreGauges
from app.store.session import Database
from tests.documentation import ROOT
from workers.supervise.metrics import WorkerMetrics

RULES = yaml.safe_load((ROOT / "docs/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
METRIC = re.compile(r"\bbitwright_[a-z_]+")
OF_PROMETHEUS = {"le", "instance"}


def names(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Names that Prometheus would store, with their labels, of everything that a registry has or will have."""
    known: dict[str, set[str]] = {}
    for collector in {id(each): each for each in registry._names_to_collectors.values()}.values():
        for family in collector.describe():  # type: ignore[attr-defined]
            labels = set(getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ()))
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            known |= {family.name + ending: labels for ending in endings}
    return known


def test_rules_name_what_there_is(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    api = Metrics(dict, lambda: 0.0)
    api.registry.register(StoreGauges(database, by_tenant=True))
    known = names(api.registry) | names(WorkerMetrics().registry)
    for rule in RULES:
        expression = rule["expr"]
        used = set(METRIC.findall(expression))
        assert used, rule["alert"]
        assert used <= known.keys(), f"{rule['alert']}: {used - known.keys()}"
        labels = set(re.findall(r"(\w+)=~?\"", expression))
        for grouped in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expression):
            labels |= {word.strip() for word in grouped.split(",")} - {""}
        allowed = OF_PROMETHEUS.union(*(known[name] for name in used))
        assert labels <= allowed, f"{rule['alert']}: {labels - allowed}"
    database.close()


def test_every_rule_has_a_severity_and_one_line_of_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 8
    for rule in RULES:
        told: dict[str, Any] = rule["annotations"]
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert "\n" not in told["runbook"].strip()
        assert len(told["runbook"].split()) >= 8, rule["alert"]
        assert told["summary"]


def test_the_store_tells_what_waits_and_who_stores(tmp_path: Path, sqlite_url: str) -> None:
    from prometheus_client import generate_latest
    from sqlalchemy import update

    from app.store.clock import seconds_from_now
    from app.store.models import Job
    from app.store.tenancy.keys import ensure_tenant
    from app.store.workers import register
    from bitwright.job_states import DeviceClass
    from tests.store.samples import add, artifact, succeed, take

    database = Database(sqlite_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "first").id
        register(session, "w1", DeviceClass.CPU)
    add(database, tenant)
    succeed(database, take(database), [artifact(size=123)])
    add(database, tenant, device="cuda")
    with database.transaction() as session:
        session.execute(update(Job).values(available_at=seconds_from_now(-500)))

    def told(by_tenant: bool) -> dict[tuple[str, ...], float]:
        registry = CollectorRegistry()
        registry.register(StoreGauges(database, by_tenant=by_tenant))
        families = text_string_to_metric_families(generate_latest(registry).decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    figures = told(by_tenant=True)
    assert figures["bitwright_waiting_jobs", "cuda"] == 1
    assert 500 <= figures["bitwright_queue_age_seconds", "cuda"] < 520
    assert figures["bitwright_queue_age_seconds", "any"] == 0
    assert (figures["bitwright_live_workers", "cpu"], figures["bitwright_live_workers", "cuda"]) == (1, 0)
    assert figures["bitwright_tenant_stored_bytes", tenant] == 123
    assert tenant not in str(told(by_tenant=False)), "without a key nobody is told of tenants"
    database.close()
