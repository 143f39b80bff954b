"""Pages of a tenant's jobs by any filters, at a cost that does not grow with the jobs that do not match.

Every filter has an index in the order of pages. Status, method and model are read together: jobs of each status, by
method and by recipe each, from its index, then merged. Of labels a rare one is read first, and all else is looked up
for each of its jobs; a frequent one is looked up for jobs of the columns. Only filters that are all frequent and never
meet are searched at length; the time limit of a statement (`Database`) ends that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Select,
    String,
    Text,
    cast,
    func,
    literal_column,
    or_,
    select,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.orm import Session, defer

from app.store.models import MODEL_START, START_LENGTH, Job, JobLabel, table_of
from app.store.session import BY_VALUES
from bitwright.job_states import JobStatus

FEW = 1000
"""A label that fewer jobs have is read in full before all else is looked up; else columns that fewer have."""
MANY = 10_000
"""A label that more jobs have is looked up where there is a column to begin with."""

JOBS, LABELS = table_of(Job), table_of(JobLabel)
JOB, LABEL = JOBS.c, LABELS.c
STATE: Sequence[ColumnElement[Any]] = (
    JOB.id,
    type_coerce(JOB.status, String),
    JOB.held,
    JOB.last_event,
    JOB.attempt,
    JOB.cancel_requested,
    JOB.updated_at,
    JOB.started_at,
    JOB.finished_at,
    cast(JOB.progress, Text),
    cast(JOB.error, Text),
)
"""All of a listed job that changes during its life, with its id; documents as the text that is stored."""

COUNTED = 30_000
"""So many jobs of a model or method are counted, to find the rarer one."""

Ids = Select[str]
Column = Literal["model", "method"]
Conditions = list[ColumnElement[bool]]


@dataclass(frozen=True)
class JobFilters:
    """Properties that the jobs of a list have in common; None stands for any."""

    status: JobStatus | None = None
    method: str | None = None
    """A method, or the recipe that was asked for."""
    model: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_columns(self) -> bool:
        """True if a column of the job is among the filters."""
        return any(wanted is not None for wanted in (self.status, self.method, self.model))

    @property
    def texts(self) -> list[str]:
        """All that a caller wrote."""
        return [text for text in (self.method, self.model, *self.labels, *self.labels.values()) if text is not None]


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job of a page as far as it changes: with the same `state` it looks the same."""

    id: str
    status: str
    held: bool
    state: tuple[Any, ...]


def newest_states(
    session: Session, tenant_id: str, filters: JobFilters, after: str | None, limit: int
) -> Sequence[ListedJob]:
    """Up to `limit` jobs, newest first, that match every filter and are older than the job `after`."""
    query = _page(session, tenant_id, filters, after, limit)
    return [ListedJob(row[0], row[1], row[2], row) for row in session.execute(query.with_only_columns(*STATE)).all()]


def newest_jobs(session: Session, tenant_id: str, filters: JobFilters, after: str | None, limit: int) -> Sequence[Job]:
    """The same jobs with all that a list shows of them; without reports."""
    ids = session.scalars(_page(session, tenant_id, filters, after, limit)).all()
    return jobs_of(session, ids)


def jobs_of(session: Session, ids: Sequence[str]) -> Sequence[Job]:
    """Those of the jobs that are still there, newest first, without their reports."""
    page = select(Job).where(Job.id.in_(ids)).order_by(Job.id.desc())
    return session.scalars(page.options(defer(Job.report, raiseload=True))).all()


def _page(session: Session, tenant_id: str, filters: JobFilters, after: str | None, limit: int) -> Ids:
    """The query for the ids of a page, planned for its filters if it has any."""
    query = _matching(session, tenant_id, filters, after, limit)
    return query.execution_options(**BY_VALUES) if filters.by_columns or filters.labels else query


def _matching(session: Session, tenant_id: str, filters: JobFilters, after: str | None, limit: int) -> Ids:
    """The ids of a page."""
    if not filters.labels:
        return _newest(_by_columns(session, tenant_id, filters, after), limit)
    by_label = {
        name: select(LABEL.job_id).where(*_is_label(tenant_id, name, value), *_before(LABEL.job_id, after))
        for name, value in filters.labels.items()
    }
    # One label alone is read in the order of pages whether many have it or not.
    most = MANY if filters.by_columns or len(by_label) > 1 else FEW
    rarest, count = _rarest(session, by_label, most)
    others = _has_labels({name: value for name, value in filters.labels.items() if name != rarest})
    if count < FEW:
        some = session.scalars(by_label[rarest].execution_options(**BY_VALUES)).all()
        return select(JOB.id).where(JOB.id.in_(some), *_columns(filters), *others).order_by(JOB.id.desc()).limit(limit)
    if filters.by_columns and (count >= MANY or _few_by_columns(session, tenant_id, filters)):
        labelled = _has_labels(filters.labels)
        return _newest([ids.where(*labelled) for ids in _by_columns(session, tenant_id, filters, after)], limit)
    return (
        by_label[rarest]
        .join(JOBS, JOB.id == LABEL.job_id)
        .where(*_columns(filters), *others)
        .order_by(LABEL.job_id.desc())
        .limit(limit)
    )


def _by_columns(session: Session, tenant_id: str, filters: JobFilters, after: str | None) -> list[Ids]:
    """Jobs of the columns, of each part of an index in which they stand in the order of pages."""
    ours = select(JOB.id).where(JOB.tenant_id == tenant_id, *_before(JOB.id, after))
    return [ours.where(*each) for each in _indexed_columns(filters, _passed_over(session, tenant_id, filters))]


def _rarest(session: Session, by_label: Mapping[str, Ids], most: int) -> tuple[str, int]:
    """The label that the fewest jobs have, of those that are looked at, and how many do, up to `most`."""
    rarest, least = next(iter(by_label)), most
    for name, ids in by_label.items():
        # In the index's order, or PostgreSQL collects all of a frequent label before it counts the first.
        count = _count(session, ids.order_by(LABEL.job_id.desc()), least)
        if count < least:
            rarest, least = name, count
        if least < FEW:
            break
    return rarest, least


def _few_by_columns(session: Session, tenant_id: str, filters: JobFilters) -> bool:
    """True if an index of columns holds fewer than `FEW` jobs of the filters that it knows."""
    of_method = [] if filters.method is None else [[JOB.method == filters.method], [JOB.recipe == filters.method]]
    of_model = [] if filters.model is None else [_is_model(filters)]
    ours = select(JOB.id).where(JOB.tenant_id == tenant_id)
    for indexed in (of_method, of_model) if of_method or of_model else ([[]],):
        parts = [ours.where(*status, *name) for status, name in product(_statuses(filters), indexed)]
        if parts and _count(session, union_all(*parts), FEW) < FEW:
            return True
    return False


def _statuses(filters: JobFilters) -> list[Conditions]:
    """Each status that a job may have."""
    return [[JOB.status == status] for status in ([filters.status] if filters.status is not None else JobStatus)]


def _indexed_columns(filters: JobFilters, passed_over: Column | None) -> list[Conditions]:
    """Conditions of each part of an index in which the jobs stand in the order of pages; one job may be in two.

    passed_over   a column whose index is not to be taken
    """
    if not filters.by_columns:
        return [[]]
    names: list[Conditions] = [[]]
    if filters.method is not None:
        names = [[JOB.method == filters.method], [JOB.recipe == filters.method, JOB.method != filters.method]]
        if passed_over == "method":
            names = [[or_(*(name.concat("") == filters.method for name in (JOB.method, JOB.recipe)))]]
    model = _is_model(filters) if passed_over != "model" else [JOB.model.concat("") == filters.model]
    return [[*status, *name, *model] for status, name in product(_statuses(filters), names)]


def _passed_over(session: Session, tenant_id: str, filters: JobFilters) -> Column | None:
    """The one of model and method that more jobs have, for SQLite, which would take either index: it counts nothing.

    PostgreSQL knows how frequent values are.
    """
    if session.get_bind().dialect.name != "sqlite" or filters.model is None or filters.method is None:
        return None
    start: ColumnElement[str] = literal_column(MODEL_START)
    ours = select(JOB.id).where(JOB.tenant_id == tenant_id)
    of_model = _count(session, ours.where(start == filters.model[:START_LENGTH]), COUNTED)
    of_method = _count(session, ours.where(JOB.method == filters.method), COUNTED)
    of_method += _count(session, ours.where(JOB.recipe == filters.method), COUNTED)
    return "method" if of_model <= of_method else "model"


def _count(session: Session, ids: Ids | CompoundSelect[str], most: int) -> int:
    counted = select(func.count()).select_from(ids.limit(most).subquery())
    return session.scalar(counted.execution_options(**BY_VALUES)) or 0


def _columns(filters: JobFilters) -> Conditions:
    """The same filters as one condition."""
    conditions = [JOB.status == filters.status] if filters.status is not None else []
    if filters.method is not None:
        conditions.append((JOB.method == filters.method) | (JOB.recipe == filters.method))
    return [*conditions, *_is_model(filters)]


def _is_model(filters: JobFilters) -> Conditions:
    model = filters.model
    if model is None:
        return []
    start: ColumnElement[str] = literal_column(MODEL_START)
    whole = [JOB.model.between(model, model)] if len(model) >= START_LENGTH else []
    # Not `model = ...`: SQLite would then put that text in place of the column, and find no index on its start.
    return [start == model[:START_LENGTH], *whole]


def _has_labels(labels: Mapping[str, str]) -> Conditions:
    """That a job, which is the tenant's, has every label: counted among its own, which are sixteen at the most.

    One subquery, where one for each label would keep a planner busy for longer than the search takes. It does not ask
    for the tenant again: SQLite would then look through all of the tenant's labels, not the job's. There cannot be
    more than are counted; of an equality PostgreSQL would expect hardly a job.
    """
    if not labels:
        return []
    label = LABELS.alias()
    wanted = tuple_(label.c.name, label.c.value).in_(list(labels.items()))
    mine = select(func.count()).select_from(label).where(label.c.job_id == JOB.id, wanted)
    return [mine.correlate(JOBS).scalar_subquery() >= len(labels)]


def _is_label(tenant_id: str, name: str, value: str) -> Conditions:
    return [LABEL.tenant_id == tenant_id, LABEL.name == name, LABEL.value == value]


def _before(job_id: ColumnElement[str], after: str | None) -> Conditions:
    return [job_id < after] if after is not None else []


def _newest(branches: Sequence[Ids], limit: int) -> Ids:
    """The newest ids of all branches, of which none has a job of another one.

    No branch is read further than the page goes: they are merged in their indexes' order.
    """
    if len(branches) == 1:
        return branches[0].order_by(JOB.id.desc()).limit(limit)
    newest = [branch.order_by(JOB.id.desc()).limit(limit) for branch in branches]
    merged = union_all(*(select(branch.subquery().c.id) for branch in newest)).subquery()
    first = select(merged.c.id).order_by(merged.c.id.desc()).limit(limit).subquery()
    return select(JOB.id).join_from(first, JOBS, JOB.id == first.c.id).order_by(JOB.id.desc())
