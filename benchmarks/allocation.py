"""LQ-LoRA's budgets on a real model: times, certified gap, bits met, error against one configuration.

    python -m benchmarks.allocation MODEL --text TEXTS.jsonl --averages 2.5 2.75 3.0 3.5

Fisher information and scores are measured once, by the engine's own code; each budget is then solved. A JSON line for
the measuring, and one a budget. `uniform` is the best single configuration for all linears that fits the budget, and
`error_at_its_bits` what the allocation reaches with no more bits than that. Errors are sums over linears of squared
weighted errors after one iteration, what the allocation minimizes; they say nothing of perplexity by themselves.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from app.domain.methods import Candidate
from app.domain.request.job_request import JobRequest
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.streamed_model import StreamedModel
from workers.engine.quantize.bit_budget import Scoring, candidates_of, solve
from workers.engine.quantize.fisher import empirical_fisher
from workers.engine.text.sequences import calibration_sequences, load_tokenizer
from workers.methods.lq_lora import LQLoRA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--averages", nargs="+", type=float, default=[2.5, 2.75, 3.0, 3.5])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--grid", type=json.loads, default={}, help="fields of the spec, as JSON")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    scoring, times = measured(given, request_of(given))
    candidates = candidates_of(scoring.model, scoring.spec)
    started = time.perf_counter()
    errors = scoring.errors(candidates)
    times["scoring_seconds"] = time.perf_counter() - started
    linears = scoring.model.linears()
    shapes = {name: (linears[name].out_features, linears[name].in_features) for name in candidates}
    costs = {name: [c.stored_bits(shapes[name]) for c in choices] for name, choices in candidates.items()}
    weights = sum(out * width for out, width in shapes.values())
    sizes = {"linears": len(candidates), "configurations": len(next(iter(candidates.values()))), "weights": weights}
    print(json.dumps(sizes | {"threads": torch.get_num_threads()} | times), flush=True)
    for average in given.averages:
        print(json.dumps(spent(candidates, costs, errors, average, weights)), flush=True)


def request_of(given: argparse.Namespace) -> JobRequest:
    calibration = {"dataset": given.text, "num_samples": given.samples, "sequence_length": given.length}
    spec = {"method": "lq-lora", "bits": {"average": max(given.averages)}} | given.grid
    return JobRequest.parse({"model": given.model, "quantization": spec, "calibration": calibration})


def measured(given: argparse.Namespace, request: JobRequest) -> tuple[Scoring, dict[str, float]]:
    model = StreamedModel.open(Checkpoint.open(Path(given.model)), torch.device(given.device))
    tokenizer = load_tokenizer(Path(given.model))
    sequences = calibration_sequences(tokenizer, request.calibration, Path(given.text), request.seed, None)
    names = [name for name in model.linears() if name != model.layout.head]
    started = time.perf_counter()
    fisher = empirical_fisher(model, sequences.ids, names, 1, lambda _: None)
    seconds = {"fisher_seconds": time.perf_counter() - started}
    return Scoring(
        model=model,
        spec=request.quantization,
        method=LQLoRA(),
        scale_dtype=torch.bfloat16,
        seed=request.seed,
        fisher=fisher,
        tick=lambda _: None,
    ), seconds


def spent(
    candidates: Mapping[str, tuple[Candidate, ...]],
    costs: Mapping[str, Sequence[int]],
    errors: Mapping[str, Sequence[float]],
    average: float,
    weights: int,
) -> dict[str, Any]:
    limit, started = int(average * weights), time.perf_counter()
    solved = solve(candidates, costs, errors, limit)
    seconds = time.perf_counter() - started
    if solved is None:
        return {"average": average, "out_of_reach": True}
    allocation, _ = solved
    line: dict[str, Any] = {
        "average": average,
        "reached": allocation.cost / weights,
        "bits_left": limit - allocation.cost,
    }
    line |= {"gap": allocation.gap, "solver_seconds": seconds, "error": allocation.error}
    one = uniform(candidates, costs, errors, limit)
    if one is None:
        return line | {"uniform": None}
    choice, cost, error = one
    equal = solve(candidates, costs, errors, cost)
    line |= {"uniform": str(choice), "uniform_bits": cost / weights, "uniform_error": error}
    return line | {"error_at_its_bits": None if equal is None else equal[0].error}


def uniform(
    candidates: Mapping[str, tuple[Candidate, ...]],
    costs: Mapping[str, Sequence[int]],
    errors: Mapping[str, Sequence[float]],
    limit: int,
) -> tuple[Candidate, int, float] | None:
    """The configuration with the least error that all linears can have within the limit, its bits and its error."""
    shared = [c for c in next(iter(candidates.values())) if all(c in choices for choices in candidates.values())]
    options = []
    for choice in shared:
        at = {name: choices.index(choice) for name, choices in candidates.items()}
        cost = sum(costs[name][index] for name, index in at.items())
        if cost <= limit:
            options.append((choice, cost, sum(errors[name][index] for name, index in at.items())))
    return min(options, key=lambda each: each[2], default=None)


if __name__ == "__main__":
    main()
