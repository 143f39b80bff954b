"""The stages that quantize, towards a goal: scored once, measured where it matters, made, and made again where needed.

1. One pass of the calibration text, and back, scores every linear's candidates (`workers.engine.quantize.scores`).
2. The frontier is the best allocation of each of `POINTS` sizes.
3. For a distance, points are rounded to nearest and measured on held-out calibration text until the smallest that
   holds is known. For a size, the point of that size is the result, and it and both ends are measured.
4. A method that looks at weights alone makes what was measured. Any other is closer than rounding by a factor that
   only making tells: the point is made and measured on the held-out text, then a smaller or a larger one, at most as
   often as the request's `rounds`.

A point holds if it keeps the limit with a margin (`workers.engine.goal.search.margin`), for the text that decides is a
sample.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.domain.goals.reach import too_small
from bitwright.errors import GoalOutOfReach
from bitwright.events import Stage
from bitwright.report import ScaleReport
from workers.engine import scales
from workers.engine.finished_blocks import FinishedBlocks
from workers.engine.goal.frontier import Point, Scores, frontier
from workers.engine.goal.held_out import HeldOut, split
from workers.engine.goal.limits import Limits, limits_of
from workers.engine.goal.outcome import allocation_report, goal_report, points_report, uniform_sizes
from workers.engine.goal.progress import Progress, forget_others, point_folder
from workers.engine.goal.search import Curve
from workers.engine.job import Job, Prepared
from workers.engine.quantize.candidates import joined_choices
from workers.engine.quantize.scores import predicted_errors
from workers.engine.quantize.stage import Quantized

TUNING_GAIN = 4.0
"""A distance out of reach of rounding by less than this factor is tried, with a method that tunes."""


def make(job: Job, quantize: Callable[[Job], Quantized]) -> tuple[Job, Quantized, ScaleReport | None]:
    """The job with its final schemes, quantized; without a goal, as it is.

    quantize   the stage that does so for given schemes

    Raises:
        GoalOutOfReach: before anything is tuned.
        NumericalFailure: a score, a weight or an output is not finite.
    """
    if job.spec.goal() is None or job.base_job is not None:
        quantized = quantize(job)
        return job, quantized, scales.run(job, quantized)
    aim = _opened(job)
    resumed: dict[int, int] = {}
    index = aim.first()
    while True:
        made = aim.job_of(index)
        quantized = quantize(made)
        aim.note_told(made)
        tuned = scales.run(made, quantized)
        made.finished_blocks.resumed = resumed.setdefault(index, made.finished_blocks.resumed)
        following = aim.judged(index, made, quantized)
        if following == index:
            return aim.finished(index, made), quantized, tuned
        del quantized
        index = following


@dataclass
class _Aim:
    """The way to a goal: what is known of the frontier grows.

    job        with the calibration text that is not held out
    held_out   None where there is too little text, or none is needed any more
    """

    job: Job
    limits: Limits
    scores: Scores
    points: tuple[Point, ...]
    progress: Progress
    held_out: HeldOut | None

    @property
    def curve(self) -> Curve:
        return Curve([point.error for point in self.points], self.progress.rounded, self.progress.made)

    def first(self) -> int:
        """The point to make first; of a job that is resumed, the one in hand.

        Raises:
            GoalOutOfReach: the frontier does not reach the limit.
        """
        if self.limits.kl is None:
            of_size = self._of_size()
            for each in dict.fromkeys((of_size, 0, len(self.points) - 1)):
                self._round(each)
            return of_size
        limit = self.limits.holds
        while (index := self.curve.next_rounded(limit)) is not None:
            self._round(index)
        found = self.curve.smallest_rounded(limit)
        if found is None and (self.exact or min(self.curve.rounded.values()) > TUNING_GAIN * limit):
            raise self._out_of_reach(self.limits.kl)
        if self.exact and found is not None:
            return found
        following = self.curve.next_made(limit, self.job.spec.most_rounds())
        return self.curve.chosen(limit) if following is None else following

    @property
    def exact(self) -> bool:
        """True if the method makes what was measured: it looks at weights alone."""
        return not self.job.spec.observes_inputs()

    def judged(self, index: int, made: Job, quantized: Quantized) -> int:
        """The point to make next; the same one if it is the result."""
        if self.limits.kl is None or self.exact or self.held_out is None:
            return index
        started, limit = time.perf_counter(), self.limits.holds
        if index not in self.progress.made:
            kl = self.held_out.made(made, quantized.head)
            self._note(started, made={**self.progress.made, index: kl})
            self.job.reporter.log("goal_point_made", point=index, bytes=self.bytes(index), kl=kl, limit=limit)
        following = self.curve.next_made(limit, self.job.spec.most_rounds())
        chosen = self.curve.chosen(limit)
        forget_others(self.job, {chosen} if following is None else {chosen, following})
        return chosen if following is None else following

    def note_told(self, made: Job) -> None:
        """Blocks of a point that was made have been told of, should it be taken again."""
        milestones = (made.rounds_before + 1) * len(made.model.blocks)
        self.job = replace(self.job, order=self.job.order.with_told(milestones))

    def job_of(self, index: int) -> Job:
        """The job that makes a point."""
        chosen = {name: self.scores.candidates[name][x].scheme for name, x in self.points[index].choices.items()}
        report = allocation_report(self.scores, self.points[index], self.job, self.progress.seconds)
        return replace(
            self.job,
            prepared=Prepared(schemes=chosen, report=report),
            schemes={**self.job.schemes, **chosen},
            finished_blocks=FinishedBlocks(point_folder(self.job, index), self.job.processes),
            rounds_before=self.progress.rounds_before(index),
        )

    def finished(self, index: int, made: Job) -> Job:
        """The job of the result, with the report of the way there."""
        points = points_report(self.points, self.limits, self.curve)
        text = None if self.held_out is None else self.held_out.sequences.report()
        report = goal_report(made.spec, self.limits, points, index, self.curve, text, self.progress, exact=self.exact)
        self.held_out = None
        rounds = max(len(self.progress.made), 1)
        return replace(made, prepared=replace(made.prepared, goal=report), rounds_before=rounds - 1)

    def bytes(self, index: int) -> int:
        """Of the weight files of a point, at the most."""
        return self.limits.kept + self.points[index].bits // 8

    def _of_size(self) -> int:
        """The largest point of the limit."""
        limit = self.limits.bits
        return max((i for i, point in enumerate(self.points) if limit is None or point.bits <= limit), default=0)

    def _round(self, index: int) -> None:
        if self.held_out is None or index in self.progress.rounded:
            return
        started = time.perf_counter()
        kl = self.held_out.rounded(self.job_of(index), dict(self.job_of(index).schemes))
        self._note(started, rounded={**self.progress.rounded, index: kl})
        self.job.reporter.log("goal_point_rounded", point=index, bytes=self.bytes(index), kl=kl)

    def _note(self, started: float, **facts: dict[int, float]) -> None:
        seconds = self.progress.seconds + time.perf_counter() - started
        self.progress = self.progress.model_copy(update={**facts, "seconds": seconds}).save(self.job)

    def _out_of_reach(self, kl: float) -> GoalOutOfReach:
        points = points_report(self.points, self.limits, self.curve)
        nearest = min(self.curve.rounded.values())
        return GoalOutOfReach(
            f"the largest choices come as close as a KL of {nearest:.3g}, and at most {kl:g} is asked for",
            field="quantization.at_most",
            value=kl,
            hint="allow more, or name wider choices; `frontier` has what can be reached",
            frontier=points,
        )


def _opened(job: Job) -> _Aim:
    """Scored, or adopted from an earlier attempt."""
    job.clock.enter(Stage.CALIBRATE)
    texts, sequences = split(job.texts)
    limits = limits_of(job, 0 if sequences is None else sequences.ids.numel())
    progress = Progress.adopted(job)
    full, job = job, replace(job, texts=texts)
    costs = limits.costs
    if limits.bits is not None and sum(map(min, costs.values())) > limits.bits:
        sizes = uniform_sizes(limits)
        raise too_small(job.spec, limits.weights, limits.kept, sizes[0].bytes, sizes)
    if progress is None and texts.calibration is not None:
        started = time.perf_counter()
        errors = predicted_errors(job, texts.calibration.ids, limits.candidates)
        progress = Progress(
            fingerprint=full.fingerprint(),
            errors={name: tuple(each) for name, each in errors.items()},
            seconds=time.perf_counter() - started,
        ).save(job)
    if progress is None:
        raise TypeError("a goal is scored on calibration text")
    scores = Scores(
        limits.candidates, costs, progress.errors, joined_choices(job.model, job.request.formats, limits.candidates)
    )
    points = frontier(scores, limits.bits)
    # Its activations are made again by every attempt: nothing of them is kept.
    held_out = None if sequences is None else HeldOut.through(job, sequences, limits.candidates)
    return _Aim(job, limits, scores, points, progress, held_out)
