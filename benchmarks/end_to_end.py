"""Settings of the end-to-end stage, tried one after another on the same quantized blocks.

    python -m benchmarks.end_to_end MODEL --calibration calibration.jsonl --choice other.jsonl --valid valid.jsonl \
        --scheme mxfp4a16 --settings steps=0 steps=100,codes=0 steps=100 steps=200,pace=0.25

Blocks are quantized once, as the preset `default` of SignRound does, and again for other settings of the job. A row
of each setting: KL on the text of `--choice`, which nothing is tuned on, to choose a setting by; KL on each text of
`--valid`, to publish of the one that was chosen, and perplexity on the first; KL on the held-out share of the tuned
text before and after; weights whose code changed, seconds, and the memory of the device that the stage takes beside
its text. Models are judged by transformers, as in `benchmarks.number_formats`.

    steps   end to end; 0: blocks as they are
    codes   0: codes stay
    norms   0: norms stay
    pace    of codes, in parts of the rate of scales
    rate    of scales at its highest
    box     the farthest that a place starts from its code
    batch   sequences a step
    beta    of m; beta2: of v
    seed    of the order of sequences and of the held-out share
    blocks  steps of the blocks, where other than `--steps`
    job     seed of the job: its blocks' sequences, their order, and the stage's
    samples sequences of the blocks
    by      what quantizes blocks: 0 SignRound, 1 Block-AP, 2 GSQ (`benchmarks.few_bits.published`)
    zero    1: with zero points
    settled, averaged, floor, shared, turns, trimmed, bounded   rules of `workers.engine.scales.step_rules`

and sequences that are tuned on besides (`benchmarks.few_bits.texts`); own=1: in place of the calibration's

    further  of `--further`
    cut      windows of the calibration text at its start and then at offsets between these
    written  what the original writes itself after places of the calibration text
    free     what it writes after a token drawn from all
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.request.job_request import JobRequest
from benchmarks.against_auto_round import EVALUATION_LENGTH, QualityMeter, parse_scheme, read_rows, read_text, windows
from benchmarks.few_bits.generations import Prompts
from benchmarks.few_bits.published import BLOCKS
from benchmarks.few_bits.texts import cut, free_sequences, mixed, sequences_of, written_sequences
from workers.contracts.blocks import BlockTask
from workers.disk.orders import AttemptOrder
from workers.engine import goal, quantize, scales
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.opening import open_job
from workers.engine.quantize.activations import Activations
from workers.engine.reporter import Reporter
from workers.engine.scales import memory_plan, moving_codes, tuning
from workers.engine.scales import stage as scales_stage
from workers.engine.scales.step_rules import StepRules
from workers.engine.text.generated import Generation
from workers.engine.untrusted.asking import JobInput
from workers.methods import sign_round
from workers.numerics.quantized import BlockWeight

HEADER = "| setting | KL, choice | KL of each text | perplexity | held out, before | after | codes | seconds | GiB |\n"
TEXTS = ("further", "cut", "written", "free")
"""Settings that are numbers of sequences."""
BY = ("signround", *BLOCKS)
OWN_BLOCKS = sign_round.SignRound.quantize_block
OF_JOBS = ("blocks", "job", "samples", "by", "zero")
"""Settings for which blocks are made anew."""
PACE, BOX, RATE, BETAS, BATCH = moving_codes.PACE_CODES, moving_codes.BOX, tuning.LEARNING_RATE, tuning.BETAS, 4


class Done(Exception):
    """The end of the job: every setting was tried."""


def apply(setting: dict[str, float]) -> None:
    """Makes a setting's numbers those of the engine."""
    moving_codes.REACH_STEPS = 10**9  # a setting says the pace itself
    moving_codes.PACE_CODES = setting.get("pace", PACE)
    moving_codes.BOX = setting.get("box", BOX)
    tuning.LEARNING_RATE = setting.get("rate", RATE)
    tuning.BETAS = (setting.get("beta", BETAS[0]), setting.get("beta2", BETAS[1]))
    memory_plan.SCALE_BATCH_SIZE = int(setting.get("batch", BATCH))


def original_states(job: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of sequences, and the original model's hidden states after its last block."""
    with job.model.loaded(*job.model.layout.outer):
        states = Activations(job.model, ids, job.plan, keep_inputs=False)
    for index, block in enumerate(job.model.blocks):
        with job.model.loaded(job.model.layout.block(index)):
            states.advance_original(index, block)
    return states.quantized, states.original


def rules_of(setting: dict[str, float]) -> StepRules:
    """The rules that a setting names."""
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(StepRules)}
    return StepRules(**{name: kind(setting[name]) for name, kind in kinds.items() if name in setting})


class Texts:
    """Further sequences as the stage takes them: embeddings, and the original's states; each kind is made once."""

    def __init__(self, given: argparse.Namespace, model: str, settings: list[dict[str, float]]) -> None:
        self._given, self._model = given, model
        self._most = {kind: max(int(setting.get(kind, 0)) for setting in settings) for kind in TEXTS}
        self._states: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, job: Any, setting: dict[str, float]) -> tuple[Tensor, Tensor] | None:
        """All that a setting asks for."""
        found = [tuple(t[: int(setting[kind])] for t in self._made(job, kind)) for kind in TEXTS if setting.get(kind)]
        return (torch.cat([one for one, _ in found]), torch.cat([other for _, other in found])) if found else None

    def _made(self, job: Any, kind: str) -> tuple[Tensor, Tensor]:
        if kind not in self._states:
            started = time.perf_counter()
            ids = getattr(self, f"_{kind}")(self._most[kind], job.model.device)
            self._states[kind] = original_states(job, ids)
            print(f"| {kind}: {len(ids)} sequences in {time.perf_counter() - started:.1f} s", flush=True)
        return self._states[kind]

    def _further(self, count: int, _: torch.device) -> Tensor:
        return sequences_of(self._tokenizer, mixed(self._given.further), self._given.length, count)

    def _cut(self, count: int, _: torch.device) -> Tensor:
        return cut(self._tokenizer, read_text(self._given.calibration), self._given.length, count)

    def _written(self, count: int, device: torch.device) -> Tensor:
        text = windows(self._tokenizer, read_text(self._given.calibration), self._given.length)[: self._given.samples]
        return written_sequences(self._by(device), text[:, 0], self._given.length, count, seed=0)

    def _free(self, count: int, device: torch.device) -> Tensor:
        return free_sequences(self._by(device), self._given.length, count, seed=0)

    def _by(self, device: torch.device) -> Generation:
        return Generation(Checkpoint.open(Path(self._model)), self._tokenizer, device, Path(), True, lambda *_: None)

    @property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._model)


def with_further(task: Any, further: tuple[Tensor, Tensor] | None, setting: dict[str, float]) -> Any:
    """The task with more sequences beside or in place of its own."""
    if further is None:
        return task
    inputs, targets = further
    return replace(task, inputs=inputs, targets=targets) if setting.get("own") else replace(task, further=further)


def tune(job: Any, quantized: Any, setting: dict[str, float], further: tuple[Tensor, Tensor] | None) -> str:
    """Tunes by a setting and makes the result that of the finished blocks; the end of a row."""
    apply(setting)
    if not setting.get("steps", 100):
        return "| | | | | |"
    started = time.perf_counter()
    on_device = job.model.device.type == "cuda"
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_device else 0
    quantized.calibration.rewind(job.model)
    task = replace(
        scales_stage._task(job, quantized.calibration, quantized),
        steps=int(setting.get("steps", 100)),
        codes=bool(setting.get("codes", 1)),
        rules=rules_of(setting),
    )
    task = with_further(replace(task, norms=bool(setting.get("norms", task.norms))), further, setting)
    found = tuning.tune_scales(replace(task, seed=task.seed + int(setting.get("seed", 0))))
    if isinstance(found, memory_plan.Skipped):
        return found.reason
    seconds = time.perf_counter() - started
    report = scales_stage._report(found, task.steps, seconds)
    job.finished_blocks.save_scales(found.scales, report, found.norms, found.codes)
    slower = "" if found.captured else " eager"
    peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f}" if on_device else ""
    held_out = f"{found.divergence_initial:.5f} | {found.divergence:.5f}"
    return f"| {held_out} | {found.changed:,} | {seconds:.1f}{slower} | {peak} |"


def weights(job: Any) -> dict[str, Tensor]:
    """What the finished blocks have changed, by full parameter name."""
    found: dict[str, Tensor] = {}
    for index in range(len(job.model.blocks)):
        linears = job.finished_blocks.load(index)
        found |= {f"{name}.weight": result.dequantize() for name, result in linears.items()}
        found |= job.finished_blocks.parameters(index)
    return found


class Judges:
    """What a row's figures are of: texts, and generations where these are asked for."""

    def __init__(self, given: argparse.Namespace, model: str, device: str) -> None:
        size = (given.sequences, device, given.judged_length)
        self._model, self._keeps = model, device == "cuda"
        self._meters = [QualityMeter(model, read_text(text), *size) for text in (given.choice, *given.valid)]
        self._prompts = None
        if given.generations is not None:
            self._prompts = Prompts.of(model, read_rows(given.generations), torch.device(device))

    def row(self, text: str, changed: dict[str, Tensor], end: str) -> None:
        """Prints the row of a setting: `changed` are the weights that the original does not have, by full name."""
        whole = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.bfloat16)
        whole.load_state_dict(changed, strict=False)
        choice, *valid = (meter(whole, keep=self._keeps) for meter in self._meters)
        if self._prompts is not None:
            print(f"| {text} | {self._prompts.compared(whole)}", flush=True)
        each = " ".join(f"{judged['kl']:.5f}" for judged in valid)
        print(f"| {text} | {choice['kl']:.5f} | {each} | {valid[0]['perplexity']:.3f} {end}", flush=True)


def stage_of(settings: dict[str, dict[str, float]], texts: Texts, judges: Judges) -> Any:
    """In place of the stage: all settings, and then the end."""

    def stage(job: Any, quantized: Any) -> None:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in job.clock.seconds().items())
        print(f"| before: {seconds}", flush=True)
        before = job.finished_blocks._state
        for text, setting in settings.items():
            end = tune(job, quantized, setting, texts.of(job, setting))
            judges.row(text, weights(job), end)
            job.finished_blocks._state, job.finished_blocks._scales = before, {}
        raise Done

    return stage


def setting_of(text: str) -> dict[str, float]:
    """ "steps=400,pace=0.25" as numbers by name."""
    return {key: float(value) for key, _, value in (part.partition("=") for part in text.split(","))}


def not_compensated(task: BlockTask) -> dict[str, BlockWeight]:
    """Nothing: linears begin with the search."""
    del task
    return {}


def body_of(given: argparse.Namespace, asked: Mapping[str, float]) -> dict[str, Any]:
    """The request whose blocks settings share; asked: what they say of the job."""
    rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
    only = {"overrides": {given.only: {"scheme": given.scheme}}} if given.only else {}
    scheme = {"scheme": "q8_0" if only else given.scheme, "modules": only}
    if given.scheme.startswith("W"):
        found = parse_scheme(given.scheme)
        symmetric = found.symmetric and not asked.get("zero")
        scheme = {"bits": found.bits, "group_size": found.group_size, "symmetric": symmetric}
    steps = int(asked.get("blocks", given.steps))
    return {
        "model": str(Path(given.model).resolve()),
        "quantization": {"method": "signround", "steps": steps, "scale_steps": 1, **scheme, **rate},
        "calibration": {
            "dataset": {"source": "local", "path": str(Path(given.calibration).resolve())},
            "num_samples": int(asked.get("samples", given.samples)),
            "sequence_length": given.length,
        },
        "evaluation": None,
        "formats": ["native"],
        "seed": int(asked.get("job", 0)),
    }


def run_job(given: argparse.Namespace, asked: Mapping[str, float], device: str) -> None:
    """The job of these settings, to the stage that ends it."""
    body, by = body_of(given, asked), int(asked.get("by", BY.index(given.blocks)))
    sign_round.SignRound.quantize_block = BLOCKS.get(BY[by], OWN_BLOCKS)  # type: ignore[method-assign,assignment]
    order = AttemptOrder(
        job_id="job_benchmark",
        attempt=1,
        request=JobRequest.parse(body),
        model_path=body["model"],
        calibration_path=body["calibration"]["dataset"]["path"],
        device=device,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        open_job(order, Path(folder), Reporter(lambda _: None), 0, JobInput.of(order, Path(folder), 0)) as job,
    ):
        try:
            goal.make(quantize.prepare(job), quantize.run)
        except Done:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--choice", required=True)
    parser.add_argument("--valid", required=True, nargs="+")
    parser.add_argument("--scheme", default="mxfp4a16", help="a name, or like W2g64 and W3g64a")
    parser.add_argument("--further", nargs="*", help="texts of the stage alone, document by document in turn")
    parser.add_argument("--settings", nargs="+", required=True)
    parser.add_argument("--generations", help="text whose first documents are prompts: 64 greedy tokens are compared")
    parser.add_argument("--only", help="pattern of the linears that have the scheme; others have q8_0")
    parser.add_argument("--blocks", choices=BY, default="signround", help="what quantizes them")
    parser.add_argument("--start", choices=["gptq", "search"], default="gptq", help="of llama.cpp's types")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32, help="of the texts to choose and to publish by")
    parser.add_argument("--judged-length", type=int, default=EVALUATION_LENGTH, help="tokens of them")
    parser.add_argument("--steps", type=int, default=200, help="of a block")
    parser.add_argument("--learning-rate", type=float, help="of blocks")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.start == "search":
        sign_round.compensated = not_compensated
    settings = {text: setting_of(text) for text in given.settings}
    model = str(Path(given.model).resolve())
    texts, judges = Texts(given, model, list(settings.values())), Judges(given, model, device)
    print(HEADER, flush=True)
    alike: dict[tuple[tuple[str, float], ...], dict[str, dict[str, float]]] = {}
    for text, setting in settings.items():
        of_job = tuple(sorted((name, value) for name, value in setting.items() if name in OF_JOBS))
        alike.setdefault(of_job, {})[text] = setting
    for asked, own in alike.items():
        scales.run = stage_of(own, texts, judges)
        run_job(given, dict(asked), device)


if __name__ == "__main__":
    main()
