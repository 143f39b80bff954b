"""`bitwright demo`: from nothing to a loaded, generating checkpoint, through the same service that users run."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from app.cli.children import tied_to_this_process
from app.cli.embedded import EmbeddedService
from app.cli.installed import how_to_call
from app.cli.loading import FreshPython
from app.domain.methods import METHODS
from app.settings import get_settings
from bitwright import Client
from bitwright.cli.connection import DataDirOption
from bitwright.cli.job_details import brought
from bitwright.cli.jobs import download_checkpoint
from bitwright.cli.render import format_seconds, out, report_table, times_table
from bitwright.cli.submit import set_fields, set_section
from bitwright.cli.watch import finish, shown_on
from bitwright.errors import InternalError
from bitwright.events import ProgressEvent, Stage
from bitwright.files.folders import claim_folder
from bitwright.views import EventView, JobView

HUB = "https://huggingface.co"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
HUB_SECONDS = 2.0
PROMPT = "The list of built-in functions"

METHOD, BITS = "signround", 4
SAMPLES, SEQUENCE_LENGTH, BATCH_SIZE = 64, 256, 2
EVALUATION = {"num_samples": 16, "sequence_length": 512}
"""Little text, so that two processor cores are done in minutes; a job of your own takes its preset's sizes."""


def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder; default: a small Hub model, or one trained on the spot.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method or recipe: see `bitwright methods`.")] = METHOD,
    bits: Annotated[int | None, typer.Option(help="Width of a weight, 2 to 8.")] = BITS,
    preset: Annotated[str | None, typer.Option(help="light, default or best.", show_default="light")] = None,
    group_size: Annotated[int | None, typer.Option(help="Input columns that share a scale; -1: all.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Form of the scheme.")] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps per block.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = SAMPLES,
    sequence_length: Annotated[int, typer.Option(help="Tokens a calibration sequence.")] = SEQUENCE_LENGTH,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a tuning step.", show_default="2")] = None,
    format: Annotated[list[str] | None, typer.Option("--format", help="Checkpoint format.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same request and seed: same codes.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    prompt: Annotated[str, typer.Option(help="What the loaded checkpoint is to go on with.")] = PROMPT,
    output: Annotated[Path | None, typer.Option(help="Where the checkpoint goes; default: in the data folder.")] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Start the service, quantize a model, download the checkpoint, load it in a fresh process and generate."""
    console = out()
    if output is not None:
        claim_folder(output, {}, force=False)  # now, not after an hour of work
    with ExitStack() as stack:
        folder = stack.enter_context(_data_folder(data_dir))
        model = model or _default_model(folder)
        local = Path(model).expanduser()
        body: dict[str, Any] = {"model": str(local.resolve()) if local.is_dir() else model, "method": method}
        scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "steps": steps}
        quick = _quick_tuning(method, preset, batch_size)
        set_fields(body, scheme | {"formats": format, "seed": seed} | quick)
        set_section(body, "calibration", {"num_samples": samples, "sequence_length": sequence_length})
        set_section(body, "evaluation", EVALUATION)
        roots = _model_roots(local)
        console.print(f"Starting the service; its log: {folder / 'serve.log'}", soft_wrap=True)
        service = stack.enter_context(EmbeddedService(folder, model_roots=roots, device=device))
        client = stack.enter_context(service.client())
        job = client.submit(body)
        console.print(f"Submitted {job.id} to {service.url}", soft_wrap=True)
        fresh = stack.enter_context(FreshPython())
        job = _followed(client, job.id, console, fresh)
        if job.report is None:
            finish(job, [], as_json=False)
            raise InternalError(f"{job.id} {job.status.value} without a report")
        checkpoint = output or folder / "checkpoints" / job.id
        parts = download_checkpoint(client, job.id, checkpoint, None)
        console.print(f"Checkpoint: {checkpoint.absolute()}", soft_wrap=True)
        # The first is the model; of low-rank methods the factors lie beside it, for peft.
        loaded = fresh.load_and_generate(next(iter(parts)), prompt)
        console.print(f"Loaded in a fresh Python with {loaded.loader} in {format_seconds(loaded.seconds)}; it says:")
        console.print(f"    {loaded.text.strip()}", markup=False, soft_wrap=True)
        console.print()
        console.print(report_table(job.report, brought(job, client.artifacts(job.id))))
        console.print()
        console.print(times_table(job.report))
        if call := how_to_call():
            console.print()
            console.print(f"From here on, the command is {call}.", soft_wrap=True, markup=False)


def _followed(client: Client, job_id: str, console: Console, fresh: FreshPython) -> JobView:
    """The final job. The process that is to load its result starts when the blocks are done."""
    with shown_on(console) as show:

        def seen(stored: EventView) -> None:
            show(stored)
            if isinstance(stored.event, ProgressEvent) and stored.event.stage in (Stage.EVALUATE, Stage.EXPORT):
                fresh.start()

        return client.wait(job_id, on_event=seen)


def _model_roots(model: Path) -> list[Path]:
    """Folders that the service may read. A snapshot in a Hub cache is all links to blobs beside the snapshots."""
    if not model.is_dir():
        return []
    folder = model.resolve()
    return [folder.parents[1] if folder.parent.name == "snapshots" else folder]


def _quick_tuning(method: str, preset: str | None, batch_size: int | None) -> dict[str, str | int | None]:
    """The light preset and small batches for a method that has them; a recipe keeps its own."""
    info = METHODS.get(method)
    if info is not None and "light" in info.presets:
        preset = preset or "light"
    if info is not None and "batch_size" in info.spec.model_fields:
        batch_size = batch_size or min(BATCH_SIZE, info.spec.model_fields["batch_size"].default)
    return {"preset": preset, "batch_size": batch_size}


@contextmanager
def _data_folder(data_dir: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one that is kept, since the checkpoint lies in it."""
    folder = data_dir.expanduser().absolute() if data_dir else Path(tempfile.mkdtemp(prefix="bitwright-demo-"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield folder


def _default_model(folder: Path) -> str:
    """A small Hub model when the Hub answers at once, else the folder of a tiny one trained here and now."""
    console = out()
    settings = get_settings()
    hub = settings.hub_endpoint or HUB
    if settings.hub_enabled and _hub_answers(hub):
        console.print(f"The Hub answers; the model is {HUB_MODEL} (about 270 MB to fetch).")
        return HUB_MODEL
    target = folder / "tiny-model"
    if not (target / "config.json").exists():
        console.print(f"{hub} does not answer, so a tiny model is trained here first, in less than a minute.")
        training = [sys.executable, "-P", "-m", "workers.tiny_model", str(target)]
        trained = subprocess.run(tied_to_this_process(training), check=False)
        if trained.returncode != 0:
            raise InternalError(
                f"training the tiny model ended with exit code {trained.returncode}",
                hint="give a model of your own with --model",
            )
    console.print(f"The model is the tiny one in {target}.", soft_wrap=True)
    return str(target)


def _hub_answers(hub: str) -> bool:
    try:
        return httpx.get(f"{hub}/api/models/{HUB_MODEL}", timeout=HUB_SECONDS, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False
