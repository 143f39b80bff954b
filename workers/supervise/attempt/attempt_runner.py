"""The only place where store and engine meet: runs an attempt, keeps its lease, stores what it made.

Nothing here computes; nothing in the attempt's process knows a database, a broker, a bucket or a key.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import structlog

from app.domain.attempt_lines import AttemptEvent, FailedLine, FetchedLine, ResultLine, SpanLine
from app.domain.full_disk import disk_full
from app.domain.request.source_walk import read_sources
from app.domain.request.sources import GeneratedText
from app.store.attempts import AttemptWriter, Claim
from bitwright.errors import AttemptSuperseded, BitwrightError, DiskFull, InternalError, SourceForbidden, Unavailable
from bitwright.events import TEXT_ROLES, BlockEvent, ErrorData, LogEvent
from bitwright.job_states import JobStatus
from bitwright.report import Report
from workers.child.needs import NEEDS, over_limit, plan_limit
from workers.disk.handover import hand_over, take_back
from workers.disk.hub_cache import holding
from workers.disk.orders import AttemptOrder, FetchOrder, SpareOrder, WarmChild
from workers.disk.workspace import Workspace
from workers.machine import oom_kills
from workers.supervise.attempt.attempt_trace import AttemptTrace
from workers.supervise.attempt.base_job import base_job_folder
from workers.supervise.attempt.events import EventBuffer, LineReader
from workers.supervise.attempt.exit_errors import error_of_exit
from workers.supervise.attempt.kept_state import bring_state, keeping
from workers.supervise.attempt.lease import JobCancelled, JobPaused, LeaseKeeper, WorkerStopping
from workers.supervise.attempt.memory_limit import PREFIX, MemoryWatch, watched
from workers.supervise.attempt.outputs import store_outputs
from workers.supervise.attempt.requirements import missed_requirement
from workers.supervise.attempt.sources import fetch_order, model_path, text_path
from workers.supervise.attempt.world_size import world_size
from workers.supervise.child_env import attempt_environment, attempt_user, fetch_environment
from workers.supervise.child_process import ChildProcess
from workers.supervise.context import WorkerContext
from workers.supervise.spares.spare import Spare
from workers.supervise.tenancy import OwnToken, for_tenant, own_token

POLL_SECONDS = 0.2
CONCLUDE_SECONDS = 120.0
"""Time that an attempt's end waits for a database that is away, before the sweep has to find out."""

ENDED_WELL = frozenset({JobStatus.SUCCEEDED.value, JobStatus.QUEUED.value, JobStatus.CANCELLED.value})
"""Outcomes of an attempt that are no errors: it was given back, or its caller wanted no more."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


def supervise(context: WorkerContext, claim: Claim) -> JobStatus | None:
    """Run a claimed attempt to its end and write how it ended.

    Returns the status that the job has then; None if this attempt lost the job, or could not write its end.
    """
    with structlog.contextvars.bound_contextvars(job_id=claim.job_id, attempt=claim.attempt):
        log.info("attempt_started", worker_id=context.worker_id, device=context.device.value)
        outcome, metrics, trace = "lost", context.metrics, AttemptTrace(context, claim)
        metrics.attempt_begins()
        try:
            with LeaseKeeper(context, claim) as lease:
                attempt = _Attempt(context, claim, lease, trace)
                status = _to_the_end(attempt)
                outcome = attempt.outcome or status.value
        except AttemptSuperseded:
            outcome = AttemptSuperseded.code
            log.warning("attempt_superseded")
            return None
        except Unavailable:
            log.error("attempt_end_not_written")
            return None
        finally:
            metrics.attempt_ends(claim.request.quantization.method, outcome)
            trace.ended(outcome, well=outcome in ENDED_WELL)
            if context.spares is not None:
                context.spares.attempt_ended()
        log.info("attempt_ended", status=status.value)
        return status


def _to_the_end(attempt: "_Attempt") -> JobStatus:
    try:
        return attempt.run()
    except AttemptSuperseded:
        raise
    except JobCancelled:
        attempt.write(lambda writer: writer.cancelled())
        return JobStatus.CANCELLED
    except (WorkerStopping, JobPaused):
        return attempt.write(lambda writer: writer.release())
    except BitwrightError as error:
        log.warning("attempt_failed", code=error.code, detail=error.detail)
        return attempt.fail(error)
    except OSError as error:
        log.exception("supervisor_failed")
        if disk_full(error):
            return attempt.fail(DiskFull("the worker's disk is full"))
        return attempt.fail(InternalError(f"{type(error).__name__} on the worker"))
    except Exception as error:
        log.exception("supervisor_failed")
        return attempt.fail(InternalError(f"{type(error).__name__} on the worker"))


class _Attempt:
    """One attempt in the supervisor's hands."""

    def __init__(self, context: WorkerContext, claim: Claim, lease: LeaseKeeper, trace: AttemptTrace) -> None:
        self._context = context
        self._claim = claim
        self._lease = lease
        self._trace = trace
        self._events = EventBuffer(context, claim)
        self._workspace = Workspace.of(context.settings.workspace_dir, claim.job_id)
        self.outcome: str | None = None
        """Code of the error that ended it, once there is one."""

    def run(self) -> JobStatus:
        """Sources, attempt, storage. Raises whatever ends the attempt early."""
        self._lease.check()
        self._workspace.open()
        bring_state(self._context, self._claim, self._workspace)
        with self._reader() as warm:
            order = self._order(warm)
            self._workspace.write(self._workspace.order, order)
            given = () if warm is None else (warm.orders, warm.answers)
            # Only a model from the Hub has a revision; its folder is shared, and pruned when nobody uses it.
            held = holding(Path(order.model_path)) if order.model_revision else nullcontext()
            with held, keeping(self._context, self._claim, self._workspace):
                result = self._compute(order, given)
        self._take_back()
        with self._trace.during("store"):
            artifacts = store_outputs(self._context.blobs, self._workspace, result, self._lease, self._events)
        request = self._claim.request
        missed = missed_requirement(request.require, result.report, request.formats)
        currency = self._context.settings.price_currency
        self._events.flush()
        if missed is not None:
            self.outcome = missed.code
            report = result.report
            return self.write(lambda w: w.fail(missed, report=report, artifacts=artifacts, currency=currency))
        self.write(lambda writer: writer.succeed(result.report, artifacts, currency=currency))
        self._observe_stages(result.report)
        self._workspace.remove()
        return JobStatus.SUCCEEDED

    def fail(self, error: BitwrightError) -> JobStatus:
        """Write the attempt's error; the status that the job has then."""
        self.outcome = error.code
        return self.write(lambda writer: writer.fail(error))

    def write(self, action: Callable[[AttemptWriter], T]) -> T:
        """Do one fenced write in a transaction of its own, waiting for a database that is away.

        Raises:
            AttemptSuperseded: another attempt holds the job. Also after a commit whose answer was lost: it is written.
            Unavailable: the database stayed away.
        """
        deadline = time.monotonic() + CONCLUDE_SECONDS
        while True:
            try:
                with self._context.database.transaction() as session:
                    return action(AttemptWriter(session, self._claim.job_id, self._claim.attempt))
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _reader(self) -> AbstractContextManager[WarmChild | None]:
        """The child that reads the job's input and its results."""
        reader = self._context.reader
        return nullcontext() if reader is None else reader.lent()

    def _order(self, warm: WarmChild | None) -> AttemptOrder:
        request, tenant = self._claim.request, self._claim.tenant_id
        of_tenant = (for_tenant(self._context, self._claim), tenant)
        model = None if request.exports else model_path(*of_tenant, request, self._workspace)
        files = {
            named.field: text_path(*of_tenant, named.source, self._workspace, field=named.field)
            for named in read_sources(request)
            if named.source is not request.model
        }
        base_job = base_job_folder(*of_tenant, request.base_job, self._workspace, exports=request.exports)
        sizes = self._context.capacity.sizes()
        wanted = fetch_order(request, self._workspace, self._context.settings.hub_dir, sizes)
        fetched = None if wanted.empty else self._fetch(wanted, own_token(self._context, self._claim))
        texts = {f"{role}_path": files.get(field) for field, role in TEXT_ROLES.items()}
        others = {field: path for field, path in files.items() if path is not None and field not in TEXT_ROLES}
        if fetched is not None:
            texts = {name: path or getattr(fetched, name) for name, path in texts.items()}
            others |= fetched.other_texts
        return AttemptOrder(
            job_id=self._claim.job_id,
            attempt=self._claim.attempt,
            request=request,
            model_path=model or (fetched.model_path if fetched else ""),
            model_revision=fetched.model_revision if fetched else None,
            base_job_path=base_job,
            device=self._context.device.value,
            world_size=world_size(request, self._context.capacity.devices),
            rendezvous=str(self._workspace.rendezvous(self._claim.attempt)),
            input_memory_bytes=self._context.settings.input_memory_bytes,
            input_seconds=self._context.settings.input_seconds,
            micro_batch_divisor=self._claim.micro_batch_divisor,
            told=self._claim.told,
            traceparent=self._trace.traceparent,
            runtimes=dict(self._context.runtimes),
            warm=warm,
            limits_input=warm is not None,
            memory=self._context.settings.attempt_memory,
            tells_needs=True,
            other_texts=others,
            **texts,
        )

    def _fetch(self, wanted: FetchOrder, token: OwnToken | None) -> FetchedLine:
        if not self._context.settings.hub_enabled:
            hint = "use a local path, an upload or the builtin text, or ask the operator to set BITWRIGHT_HUB_ENABLED"
            raise SourceForbidden("this service may not fetch from the Hub", field="model", hint=hint)
        wanted = wanted.model_copy(update={"tenant_id": None if token is None else token.tenant_id})
        self._workspace.write(self._workspace.fetch_order, wanted)
        text = None if token is None else token.text
        environment = fetch_environment(self._context.settings, self._workspace, self._claim, text)
        with self._trace.during("fetch"):
            return self._listen_for(FetchedLine, "workers.child.fetch", environment)

    def _compute(self, order: AttemptOrder, given: tuple[int, ...]) -> ResultLine:
        """Let a spare do what the order says, or a process that is started for it.

        given   open descriptors that it gets
        """
        module, ranks = self._context.attempt_module, order.world_size
        self._hand_over()
        # The ranks of a job wait for each other, so that one of them that is there at once gains nothing.
        spare = self._spare(order) if ranks == 1 else None
        result = None if spare is None else self._compute_in(spare, given)
        if result is not None:
            return result
        self._lease.check()
        if self._context.kernels is not None:
            self._context.kernels.give(self._workspace.folder)
            self._hand_over()
        environment = attempt_environment(
            self._context.settings, self._context.device, self._workspace, self._claim, ranks
        )
        return self._listen_for(ResultLine, module, environment, ranks=ranks, given=given)

    def _compute_in(self, spare: Spare, given: tuple[int, ...]) -> ResultLine | None:
        """The result of a spare; None if it ended before it knew of the job, which bears no blame for that."""
        with spare:
            try:
                spare.order(self._spare_order(given))
            except OSError:
                log.warning("spare_lost", pid=spare.pid, said=spare.last_words())
                return None
            log.info("spare_taken", pid=spare.pid, ready=spare.ready, age=round(spare.age, 1))
            try:
                return self._listen(ResultLine, self._context.attempt_module, spare.child)
            except BitwrightError:
                if spare.took_order or not spare.child.ended():
                    raise
                log.warning("spare_lost", pid=spare.pid, said=spare.last_words())
                return None

    def _spare(self, order: AttemptOrder) -> Spare | None:
        """The spare that takes the order, if one waits; others end if the job wants their memory, as far as is known
        now.
        """
        spares, request = self._context.spares, order.request
        if spares is None:
            return None
        spare = spares.take()
        # After a lack of memory all of it is the job's. And how much of a GPU is free decides how much text a model
        # writes at a time, so that it must not depend on who waits beside.
        if order.micro_batch_divisor > 1 or isinstance(request.calibration.dataset, GeneratedText):
            spares.give_back()
        return spare

    def _spare_order(self, given: tuple[int, ...]) -> SpareOrder:
        return SpareOrder(
            workspace=str(self._workspace.folder),
            log=str(self._workspace.log),
            job_id=self._claim.job_id,
            attempt=self._claim.attempt,
            given=given,
        )

    def _listen_for(
        self,
        wanted: type[T],
        module: str,
        environment: Mapping[str, str],
        ranks: int = 1,
        given: tuple[int, ...] = (),
    ) -> T:
        """Run a child to its end, pass its events on, and return the line of the type `wanted` that it ended with.

        given   open descriptors that the child gets, too
        """
        folder = str(self._workspace.folder)
        with ChildProcess(
            [module, folder],
            peers=[[module, folder, str(rank)] for rank in range(1, ranks)],
            environment=environment,
            log_path=self._workspace.log,
            silence_seconds=float(self._context.settings.lease_seconds),
            given=given,
        ) as child:
            log.info("process_started", module=module, pid=child.pid, ranks=ranks)
            return self._listen(wanted, module, child)

    def _listen(self, wanted: type[T], module: str, child: ChildProcess) -> T:
        """Hear a child to its end, pass its events on, and return the line of the type `wanted` that it ended with."""
        reader, endings, kills_before = LineReader(), _Endings(), oom_kills()
        name = f"{PREFIX}{self._claim.job_id}-{self._claim.attempt}"
        with watched(name, child.pids, self._context.settings.attempt_memory) as memory:
            endings.memory = memory
            code = self._to_its_end(child, reader, endings)
            overstepped = code < 0 and memory.overstepped()
        log.info("process_ended", module=module, code=code, ignored=reader.ignored + child.dropped_lines)
        self._events.flush()
        what = "fetch" if wanted is FetchedLine else "attempt"
        if overstepped and memory.limit is not None:
            raise over_limit(memory.limit)
        if code == 0 and isinstance(endings.result, wanted):
            return endings.result
        raise error_of_exit(code, endings.failed, oom_killed=oom_kills() > kills_before, what=what)

    def _to_its_end(self, child: ChildProcess, reader: LineReader, endings: "_Endings") -> int:
        """Hear a child until it has ended; its exit code."""
        spares = self._context.spares
        while not child.ended():
            self._hear(child.lines(POLL_SECONDS), reader, endings)
            self._events.flush_if_due()
            self._lease.check()
            endings.check_memory()
            if spares is not None:
                spares.tend()
            if self._context.kernels is not None:
                self._context.kernels.tend()
        self._hear(child.remaining_lines(), reader, endings)
        return child.finish()

    def _hear(self, raw_lines: list[bytes], reader: LineReader, endings: "_Endings") -> None:
        for raw in raw_lines:
            line = reader.read(raw)
            if isinstance(line, ResultLine | FetchedLine):
                endings.result = line
            elif isinstance(line, FailedLine):
                # Of several ranks the first to report has the cause, the others only miss it.
                endings.failed = endings.failed or line.error
            elif isinstance(line, SpanLine):
                self._trace.hear(line)
            elif line is not None:
                self._note_needs(line, endings)
                if isinstance(line, BlockEvent):
                    self._context.metrics.block(self._claim.request.quantization.method, line.seconds)
                self._events.add(line)

    def _observe_stages(self, report: Report) -> None:
        for stage, seconds in report.seconds.items():
            self._context.metrics.stage(stage, seconds)

    def _note_needs(self, event: AttemptEvent, endings: "_Endings") -> None:
        """Limit a child that says what its job needs to that, and end the spares that wait if it wants their memory."""
        if not isinstance(event, LogEvent) or event.event != NEEDS:
            return
        if self._context.spares is not None:
            self._context.spares.make_room(event.fields)
        context, request = self._context, self._claim.request
        if endings.memory is not None and endings.memory.limit is None:
            ranks = world_size(request, context.capacity.devices)
            setting = context.settings.attempt_memory
            endings.memory.limit_to(plan_limit(event.fields, device=context.device.value, setting=setting, ranks=ranks))

    def _hand_over(self) -> None:
        """Give the job's files to the user that the attempt runs as, where that is another."""
        user = attempt_user(self._context.settings)
        if user is not None:
            self._workspace.log.touch()
            hand_over(self._workspace.folder, user)

    def _take_back(self) -> None:
        """Own what it has made before it goes into the store."""
        if attempt_user(self._context.settings) is not None:
            take_back(self._workspace.folder)


class _Endings:
    """The last words of a child."""

    result: ResultLine | FetchedLine | None = None
    failed: ErrorData | None = None
    memory: MemoryWatch | None = None

    def check_memory(self) -> None:
        """Raises OverLimit if the child holds more than it may."""
        if self.memory is not None:
            self.memory.check()
