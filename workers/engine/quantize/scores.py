"""Predicted distances of every linear's candidates: what each adds to the KL of the whole model, nats a token.

For small changes of the weights KL(original || changed) = 1/2 dw^T F dw, with the Fisher information F of the next
token's distribution. With F's diagonal from the squared gradients of the text's loss, by the sums of its rows and
columns (`workers.engine.quantize.fisher`), a linear's candidate with the weight W_hat costs

    e = 1/2 sum_ij r_i c_j / (sum r) (w_hat_ij - w_ij)^2 / tokens

which adds up over linears and needs no weighting between them. Errors of linears' outputs do: allocations by those are
no closer than one width for all (docs/results.md). Embeddings and head are matrices like others here.

Methods that score their own choices (`ScoringMethod`) aside, goals
and budgets of bits go by these.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.domain.methods import Candidate, Form, WeightSpec
from bitwright.errors import NumericalFailure
from bitwright.events import Stage
from workers.contracts.blocks import Fisher
from workers.engine.job import Job
from workers.engine.quantize.fisher import empirical_fisher
from workers.methods.rtn import round_to_scheme
from workers.numerics import normal_float

SCORED_TOKENS = 32_768
"""Tokens of the calibration text that are scored at the most."""
SCORED_LENGTH = 512
"""Tokens of a piece whose gradient is squared: more pieces, less noise."""
SCORED_WEIGHTS = 1 << 18
"""Weights of a matrix that are searched for each of llama.cpp's types."""
FISHER_SHARE = 0.85
"""Of the time of scoring."""


def predicted_errors(job: Job, ids: Tensor, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[float]]:
    """Of every candidate of every linear, by full name.

    ids   int64 (sequences, length), the calibration text

    Raises:
        NumericalFailure: one of them is not finite.
    """
    model, blocks = job.model, len(job.model.blocks)

    def tick(done: float) -> None:
        job.reporter.progress(Stage.CALIBRATE, done * blocks, blocks, "blocks")

    codebook, search = Form.CODEBOOK in job.spec.forms(), job.spec.rounds_to_searched_scales()

    def round_(weight: Tensor, choice: Candidate, moments: Tensor | None) -> Tensor:
        if codebook:
            return normal_float.quantize(weight, choice.scheme, job.plan.scale_dtype, torch.float32).dequantize()
        scale_dtype = job.plan.scale_dtype
        return round_to_scheme(weight, choice.scheme, scale_dtype, search=search, moments=moments).dequantize()

    def errors_of(name: str, weight: Tensor, moments: Tensor | None) -> list[float]:
        found, known = list[float](), _seen(fisher[name], least)
        for choice in candidates[name]:
            # Rows in llama.cpp's types are searched one by one, for as long as a method takes: some stand for all.
            share = None if choice.scheme.blocks is None else sampled_rows(known.rows, weight.shape[1])
            rows = weight if share is None else weight[share.to(weight.device)]
            seen = known if share is None else _evenly(known, len(share))
            found.append(rounding_error(rows, round_(rows.float(), choice, moments), seen) / tokens)
        return found

    own = job.processes.share(pieces(ids))
    fisher = empirical_fisher(
        model, own, set(candidates), job.plan.micro_batch, lambda done: tick(done * FISHER_SHARE), job.processes
    )
    tokens, errors = job.processes.total(own.numel()), dict[str, list[float]]()
    least = min((float(each.rows.sum()) for each in fisher.values() if float(each.rows.sum()) > 0), default=1.0)
    for index in range(blocks):
        prefix = model.layout.block(index)
        with model.loaded(prefix):
            for name, linear in model.block_linears(index).items():
                full = f"{prefix}.{name}"
                if full in candidates:
                    errors[full] = errors_of(full, linear.weight, _columns(_seen(fisher[full], least), model.device))
        tick(FISHER_SHARE + (1 - FISHER_SHARE) * (index + 1) / blocks)
    for name in [each for each in (model.layout.embeddings, model.layout.head) if each in candidates]:
        with model.loaded(name):
            weight = model.model.get_submodule(name).get_parameter("weight")
            # Rows of embeddings are looked up: their columns count alike, as they do when they are made.
            is_head = name == model.layout.head
            errors[name] = errors_of(name, weight, _columns(fisher[name], model.device) if is_head else None)
    demand_finite(errors, job.spec)
    return errors


def demand_finite(errors: Mapping[str, Sequence[float]], spec: WeightSpec) -> None:
    """Nothing, if all errors are numbers.

    Raises:
        NumericalFailure: one of them is not finite.
    """
    for full, each in errors.items():
        if not all(abs(error) < float("inf") for error in each):
            hint = "leave the widths out of choices that overflow the model's dtype, or give bits as a number"
            field = f"quantization.{spec.field_of_choices()}"
            raise NumericalFailure(f"{full}: a choice's error is not finite", field=field, hint=hint)


def pieces(ids: Tensor) -> Tensor:
    """The text that is scored, in pieces of one length: (pieces, length)."""
    length = ids.shape[1]
    part = next(n for n in range(min(length, SCORED_LENGTH), 0, -1) if length % n == 0)
    part = part if 2 * part > min(length, SCORED_LENGTH) else min(length, SCORED_LENGTH)
    cut = ids[:, : length // part * part].reshape(-1, part)
    return cut[: max(1, SCORED_TOKENS // part)]


def _columns(fisher: Fisher, device: torch.device) -> Tensor:
    """Weights of the columns in the search of llama.cpp's types: in place of the inputs' second moments, which the
    columns' sums of F are but for the outputs' gradients."""
    return fisher.columns.to(device, torch.float32)


def sampled_rows(rows: Tensor, columns: int) -> Tensor | None:
    """Rows that stand for all of a matrix, int64; None where it is small enough to be looked at whole.

    rows   their sums of F, fp32 (out,)

    Systematic sampling in proportion to those sums: a row of much information comes several times, and the mean of
    the sampled rows' errors a unit of it is that of all rows, weighted by it, but for the sample's noise.
    """
    count = max(1, SCORED_WEIGHTS // columns)
    if count >= len(rows):
        return None
    shares = rows.double().cpu().cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + 0.5) / count * shares[-1]
    return torch.searchsorted(shares, points).clamp_(max=len(rows) - 1)


def _evenly(fisher: Fisher, count: int) -> Fisher:
    """The information as that of `count` sampled rows, which count alike."""
    total = fisher.rows.double().sum()
    return Fisher((total / count).float().expand(count), fisher.columns)


def _seen(fisher: Fisher, least: float) -> Fisher:
    """The information; of an expert that no token met, as little as any other linear has, all weights alike."""
    if float(fisher.rows.sum()) > 0:
        return fisher
    rows, columns = torch.ones_like(fisher.rows), torch.ones_like(fisher.columns)
    return Fisher(rows * (least / len(rows)), columns * (least / len(columns)))


@torch.no_grad()
def rounding_error(weight: Tensor, rounded: Tensor, fisher: Fisher) -> float:
    """1/2 sum_ij F_ij (w_hat_ij - w_ij)^2 of a weight (out, in) and what it is rounded to, fp32 (out, in)."""
    squares = (rounded - weight.float()).square_()
    rows, columns = (side.to(squares.device, torch.float32) for side in (fisher.rows, fisher.columns))
    # Shares, so that fp32 holds the product whatever the size of the gradients.
    total = rows.double().sum()
    by_row = squares @ (columns / columns.sum())
    return float(0.5 * total * (by_row.double() @ (rows / rows.sum()).double()))
