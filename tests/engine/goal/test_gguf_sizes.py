"""The part of a GGUF file that is no quantized block, known before anything is quantized, against the file itself."""

from pathlib import Path

import gguf
import pytest

from app.domain.request.job_request import JobRequest
from tests.engine.architectures.configurations import SIZES, random_model
from tests.engine.conftest import finish
from tests.engine.ships.gguf_models import save_tokenizer
from workers.disk.orders import AttemptOrder
from workers.engine.goal.limits import beside_blocks
from workers.engine.opening import open_job
from workers.engine.reporter import Reporter
from workers.engine.untrusted.asking import JobInput
from workers.formats.gguf.sizes import ALIGNMENT, GENERAL_BYTES

pytestmark = pytest.mark.filterwarnings("ignore")
QUANTIZED = {"Q4_0", "Q8_0"}


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "mixtral", "mamba2", "qwen2_vl", "gpt2"])
def test_what_is_known_before_is_close_to_the_file_and_never_less(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head, fused experts with biases, single experts, other shapes in the file, a tower, transposed ones."""
    monkeypatch.setitem(SIZES, "vocab_size", 400)
    monkeypatch.setitem(SIZES, "sliding_window", None if model_type == "mixtral" else SIZES["sliding_window"])
    source = tmp_path / "source"
    random_model(model_type).save_pretrained(source)
    save_tokenizer(source, chat_template="{{ messages }}" * 500)
    done = finish(source, tmp_path / "job", formats=["gguf"], evaluation=None)
    (file,) = (tmp_path / "job/output/gguf").glob("*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    blocks = sum(tensor.n_bytes for tensor in tensors if tensor.tensor_type.name in QUANTIZED)
    assert blocks
    body = {"model": str(source), "method": "rtn", "bits": 4, "group_size": 32, "formats": ["gguf"], "evaluation": None}
    order = AttemptOrder(
        job_id="job_1", attempt=1, request=JobRequest.parse(body), model_path=str(source), device="cpu"
    )
    opened = tmp_path / "open"
    with open_job(order, opened, Reporter(lambda _: None), 0, JobInput.of(order, opened, 0)) as job:
        known = beside_blocks(job)
    actual = file.stat().st_size - blocks
    assert 0 <= known - actual <= GENERAL_BYTES + ALIGNMENT * (len(tensors) + 1)
    assert done.report.size.bytes_files["gguf"] == file.stat().st_size
