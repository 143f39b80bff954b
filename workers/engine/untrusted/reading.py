"""The reading of a stranger's configuration, tokenizer, template and texts, in a process that may end at any of them.

A configuration sizes modules and buffers, a tokenizer's rules may multiply a text, and a chat template is a program.
What is read here within limits, the attempt reads again, or takes as it was read.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from app.domain.formats import ExportFormat
from app.domain.inputs.architectures import is_accepted
from app.domain.workload import readers_of
from bitwright.errors import BitwrightError
from workers.disk.durable import replace_file
from workers.disk.input_orders import InputAnswer, InputOrder, TextsLine
from workers.disk.orders import AttemptOrder
from workers.disk.task_rows import AskedTasks
from workers.engine.job_texts import read_files
from workers.engine.model.checkpoint import Checkpoint
from workers.engine.model.meta_model import configuration, empty_model, model_dtype
from workers.engine.text.sequences import PROBE, has_tokenizer, load_tokenizer, writes_start
from workers.engine.text.stored_texts import save_texts

SOURCE, TOKENS, TASKS = "source", "texts.safetensors", "tasks.json"
"""In the order's place: the folder of a quantized source as it is presented, and what was read."""


def read_parts(order: InputOrder) -> Iterator[InputAnswer]:
    """Do what an order says, an answer for each part; whatever goes wrong goes through."""
    place = Path(order.place)
    try_model(order.order, place / SOURCE)
    yield InputAnswer()
    yield InputAnswer(texts=try_texts(order.order, place))


def try_model(order: AttemptOrder, scratch: Path) -> None:
    """Open the checkpoint, and build its modules and buffers from the configuration; weights are not read."""
    if order.request.exports or not order.model_path:
        return  # what this service has written
    checkpoint = Checkpoint.open(Path(order.model_path), scratch)
    if is_accepted(checkpoint.config) and not order.request.quantization.asks_for_weights_alone():
        config = configuration(checkpoint)
        empty_model(config, model_dtype(config, checkpoint), torch.device("cpu"))


def try_texts(order: AttemptOrder, place: Path) -> TextsLine | None:
    """Read all texts of a job through its tokenizer; None where nothing of it reads text."""
    folder, readers = tokenizer_folder(order, place), readers_of(order.request)
    if order.request.exports or not readers:
        with suppress(BitwrightError):  # what is wrong with a tokenizer that nothing reads is no fault of the job
            _try_tokenizer(folder)
        return None
    tokenizer = load_tokenizer(folder, " and ".join(readers))
    writes_start(tokenizer)
    tokenizer(PROBE)
    texts = read_files(order, tokenizer)
    replace_file(place / TASKS, AskedTasks(tasks=texts.tasks).model_dump_json().encode())
    return save_texts(place / TOKENS, texts.calibration, texts.evaluation, texts.finetuning, texts.probes)


def tokenizer_folder(order: AttemptOrder, place: Path) -> Path:
    """The folder whose tokenizer a job uses: the model's, or that of a quantized source as it is presented."""
    if order.request.exports and order.base_job_path is not None:
        return Path(order.base_job_path) / ExportFormat.NATIVE
    presented = next(iter((place / SOURCE).glob("*/config.json")), None)
    return Path(order.model_path) if presented is None else presented.parent


def _try_tokenizer(folder: Path) -> None:
    if has_tokenizer(folder):
        load_tokenizer(folder)(PROBE)
