"""Lists, `show` and dry runs: tables on a terminal, lines or JSON in a pipe, and the same figures in both."""

import json
from pathlib import Path

import pytest

from bitwright.report import AdapterReport, FinetuningReport, LossPoint, TextReport
from tests.api.checkpoints import write_checkpoint
from tests.bitwright.service import Service
from tests.cli.processes import command
from tests.cli.terminal import on_terminal
from tests.reports import QUALITY, report

TRAINED = {"model": "org/name", "method": "qlora", "bits": 4, "rank": 8, "finetune": {"dataset": "org/text"}}
FILES = {
    "merged": {"model.safetensors": b"m" * 5_000_000, "config.json": b"{}"},
    "peft": {"adapter_model.safetensors": b"p" * 70_000, "adapter_config.json": b"{}"},
    "native": {"w.safetensors": b"n" * 900_000},
    "adapter": {"adapter.safetensors": b"a" * 70_000},
}
FINETUNING = FinetuningReport(
    text=TextReport(source="org/text", sha256="0" * 64, num_samples=10, sequence_length=64, tokens=640),
    held_out_sequences=2,
    rows_cut=0,
    rows_dropped=0,
    trainable_parameters=4096,
    steps=500,
    steps_done=350,
    steps_kept=300,
    steps_resumed=0,
    stopped_early=True,
    losses=(LossPoint(step=10, loss=3.25), LossPoint(step=350, loss=1.5)),
    loss_before=3.5,
    loss_after=1.75,
    validations=(),
    micro_batch=4,
    blocks_recomputed=0,
    weights_kept=True,
    tokens_per_second=1000.0,
    seconds=12.0,
    peak_device_bytes=None,
)
ADAPTER = AdapterReport(
    kind="lora", rank=8, inner_ranks=(8, 8), parameters=4096, flops_per_token=8192, bits_per_weight=0.5
)


@pytest.fixture(scope="module")
def trained(service: Service) -> str:
    """A finetuned job that has succeeded."""
    told = report(finetuning=FINETUNING, adapter=ADAPTER, quality=QUALITY)
    return service.finished(TRAINED, FILES, told)


def flags(service: Service) -> tuple[str, ...]:
    return ("--url", f"http://127.0.0.1:{service.port}", "--key", service.key)


def test_jobs_in_a_pipe_are_lines_with_the_recipe(service: Service, trained: str) -> None:
    for body in (
        ["--method", "auto-round-light", "--metadata", "kind=line"],
        ["--method", "nf", "--metadata", "kind=line"],
    ):
        assert command("submit", "org/name", *body, *flags(service)).returncode == 0
    lines = command("jobs", *flags(service)).stdout.splitlines()
    rows = [line.split("\t") for line in lines]
    assert {len(row) for row in rows} == {6}
    by_method = {row[2]: row for row in rows}
    assert set(by_method) == {"qlora", "auto-round-light", "nf"}
    assert by_method["qlora"][:4] == [trained, "succeeded", "qlora", "org/name"]
    assert by_method["nf"][5].startswith("number 2 in the queue")

    def listed(method: str) -> set[str]:
        return {
            line.split("\t")[2] for line in command("jobs", "--method", method, *flags(service)).stdout.splitlines()
        }

    assert listed("qlora") == {"qlora"}
    assert listed("auto-round-light") == {"auto-round-light"}
    assert listed("signround") == {"auto-round-light"}
    assert listed("nf") == {"nf", "qlora"}, "it is the method of both"
    assert listed("lora") == set()


def test_the_recipe_of_a_full_form_is_the_one_that_it_spells_out(service: Service) -> None:
    with service.client() as client:
        first = client.submit(TRAINED)
        again = client.submit(first.request)
        plain = client.submit({"model": "org/name", "method": "rtn"})
    assert (first.recipe, again.recipe, plain.recipe) == ("qlora", "qlora", None)
    assert (first.method, plain.method) == ("nf", "rtn")


def test_jobs_on_a_terminal_are_a_table(service: Service, trained: str) -> None:
    code, shown = on_terminal("jobs", "--limit", "50", *flags(service))
    assert code == 0, shown
    head, *rows = shown.splitlines()
    assert head.split() == ["job", "status", "model", "method", "created", "progress"]
    row = next(row for row in rows if trained in row)
    assert "\t" not in row
    assert "qlora" in row


def test_what_would_break_a_line_does_not(service: Service) -> None:
    body = {"model": {"source": "hub", "id": "org/name", "revision": "x"}, "method": "rtn", "metadata": {"odd": "1"}}
    with service.client() as client:
        client.submit(body)
    lines = command("jobs", "--metadata", "odd=1", *flags(service)).stdout
    assert lines.count("\n") == 1
    from bitwright.cli.render import tabbed

    assert tabbed("a\tb", "c\nd", "e\u2028f\r") == "a b\tc d\te f "


def test_show_tells_adapter_steps_losses_and_the_size_that_comes(
    service: Service, trained: str, tmp_path: Path
) -> None:
    shown = command("show", trained, *flags(service)).stdout
    for text in (
        "qlora (nf)",
        "lora of rank 8, stays apart",
        "lora, rank 8 (inner rank 8)",
        "4,096",
        "350 of 500, the parameters after 300 kept, stopped early",
        "3.2500 to 1.5000",
        "3.5000 to 1.7500",
        "org/text, 640 tokens",
    ):
        assert text in shown, shown
    done = command("download", trained, str(tmp_path / "result"), *flags(service))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "result")
    assert f"{tmp_path / 'result' / 'merged'}: the base" in done.stderr
    assert f"{tmp_path / 'result' / 'peft'}: the adapter of that base" in done.stderr
    assert "--format brings adapter, native" in done.stderr
    sizes = {part.name: sum(f.stat().st_size for f in part.iterdir()) for part in (tmp_path / "result").iterdir()}
    assert sizes == {"merged": 5_000_002, "peft": 70_002}
    watched = command("watch", trained, *flags(service)).stdout
    for place in (shown, watched):
        lines = [" ".join(line.split()) for line in place.splitlines()]
        assert "size of merged 16 B 5 MB" in lines
        assert "size of peft 70 kB" in lines
    assert any(line.split()[:3] == ["merged", "5", "MB"] for line in shown.splitlines())


def test_a_download_into_a_foreign_folder_exits_with_2_and_names_the_way_out(
    service: Service, trained: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"another model")
    refused = command("download", trained, str(tmp_path), *flags(service))
    assert refused.returncode == 2
    assert refused.stderr.startswith("conflict: ")
    assert "--force" in refused.stderr
    assert refused.stdout == ""
    forced = command("download", trained, str(tmp_path), "--format", "peft", "--force", *flags(service))
    assert forced.returncode == 0, forced.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(FILES["peft"])


def test_a_dry_run_is_a_table_on_a_terminal_and_json_elsewhere(service: Service) -> None:
    arguments = ("submit", "org/name", "--method", "signround", "--bits", "3", "--dry-run", *flags(service))
    code, shown = on_terminal(*arguments)
    assert code == 0, shown
    rows = {row.split("  ")[0].strip(): row for row in shown.splitlines()}
    assert "signround" in rows["method"]
    assert "3 bits, group 64, symmetric" in rows["scheme"]
    assert "{" not in shown
    for code, text in (on_terminal(*arguments, "--json"), (0, command(*arguments).stdout)):
        assert code == 0
        assert json.loads(text)["request"]["quantization"]["bits"] == 3


def test_a_dry_run_shows_estimates_of_a_model_that_can_be_seen(service: Service, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    upload = command("upload", str(folder), *flags(service)).stdout.strip()
    code, shown = on_terminal("submit", upload, "--method", "rtn", "--dry-run", *flags(service))
    assert code == 0, shown
    estimates = [line for line in shown.splitlines() if line.startswith("estimate: ")]
    assert any(line.startswith("estimate: disk") and "B" in line for line in estimates), shown
    assert any(" s on cpu" in line or " min" in line for line in estimates), shown


def test_a_folder_is_one_upload(service: Service, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    for extra in ("pytorch_model.bin", ".gitattributes", "model.safetensors.0123456789ab.partial"):
        (folder / extra).write_bytes(b"x")
    (folder / "onnx").mkdir()
    done = command("upload", str(folder), *flags(service))
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin (pickled; there are safetensors)" in done.stderr
    assert "onnx (a folder)" in done.stderr
    with service.client() as client:
        sent = client.upload_status(done.stdout.strip())
        assert {file.name for file in sent.files} == names
        assert client.upload([folder]).status == "complete"
        job = client.submit({"model": sent.id, "method": "rtn", "group_size": 32})
    assert job.model == sent.id
    again = command("upload", str(folder), "--resume", sent.id, *flags(service))
    assert (again.returncode, again.stdout) == (0, done.stdout)
    (tmp_path / "empty").mkdir()
    empty = command("upload", str(tmp_path / "empty"), *flags(service))
    assert empty.returncode == 2
    assert "no files to send" in empty.stderr


def test_uploads_are_listed(service: Service, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row"}\n' * 100)
    upload = command("upload", str(rows), *flags(service)).stdout.strip()
    lines = command("uploads", *flags(service)).stdout.splitlines()
    assert lines[0].split("\t")[:3] == [upload, "complete", str(rows.stat().st_size)]
    assert lines[0].split("\t")[4:] == ["rows.jsonl"]
    assert upload not in command("uploads", "--status", "open", *flags(service)).stdout
    assert command("uploads", "--limit", "1", *flags(service)).stdout.splitlines() == lines[:1]
    listed = [json.loads(line) for line in command("uploads", "--json", *flags(service)).stdout.splitlines()]
    assert listed[0]["id"] == upload
    code, shown = on_terminal("uploads", *flags(service))
    assert code == 0
    assert shown.split("\n")[0].split() == ["upload", "status", "size", "created", "files"]
    assert upload in shown


def test_methods_are_lines_in_a_pipe_too(service: Service) -> None:
    lines = command("methods", *flags(service)).stdout.splitlines()
    rows = {line.split("\t")[0]: line.split("\t") for line in lines}
    assert {len(row) for row in rows.values()} == {4}
    assert rows["signround"][2] == "arXiv:2309.05516"
    assert rows["qlora"][1].startswith("short for ")


def test_export_prints_the_id_of_the_job_that_makes_the_formats(service: Service) -> None:
    linear = {"form": "affine", "bits": 4, "group_size": 64, "symmetric": True, "dtype": "bfloat16"}
    native = {
        "bitwright.json": json.dumps({"format": "bitwright", "version": 2, "linears": {"a": linear}}).encode(),
        "config.json": b'{"model_type": "llama"}',
        "report.json": b"{}",
    }
    job_id = service.finished({"model": "org/name", "method": "rtn"}, {"native": native})
    done = command("export", job_id, "--format", "gguf", "--format", "mlx", "--metadata", "for=phones", *flags(service))
    assert done.returncode == 0, done.stderr
    with service.client() as client:
        job = client.job(done.stdout.strip())
    assert (job.request.base_job, job.metadata) == (job_id, {"for": "phones"})
    assert list(job.request.formats or ()) == ["gguf", "mlx"]
    refused = command("export", job_id, "--format", "bitsandbytes", *flags(service))
    assert refused.returncode == 2
    assert "formats that can" in refused.stderr
