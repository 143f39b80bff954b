"""Every log line, ours or a library's, is one JSON object with the ids that are bound, and without secrets."""

import json
import subprocess
import sys

SCRIPT = """
import logging, structlog
from app.logs import configure_logging
from app.settings import Settings
configure_logging(Settings(log_format={format!r}, log_level="INFO"))
structlog.contextvars.bind_contextvars(job_id="job_1", attempt=2)
log = structlog.get_logger("bitwright.test")
log.info("block_done", index=3, token="hf_secret", database_url="postgresql://u:hf_secret@db")
log.debug("unseen")
logging.getLogger("some.library").warning("disk at %d%%", 90)
try:
    password = "hf_secret"
    raise RuntimeError("broken")
except RuntimeError:
    log.exception("failed")
"""


def run(log_format: str) -> str:
    """Standard error of a process that logs."""
    command = [sys.executable, "-c", SCRIPT.format(format=log_format)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert "hf_secret" not in done.stderr
    return done.stderr


def test_json_lines_carry_ids_and_no_secrets() -> None:
    lines = [json.loads(line) for line in run("json").splitlines()]
    assert [line["event"] for line in lines] == ["block_done", "disk at 90%", "failed"]
    assert all((line["job_id"], line["attempt"]) == ("job_1", 2) for line in lines)
    assert (lines[0]["index"], lines[0]["token"], lines[0]["level"]) == (3, "[redacted]", "info")
    assert (lines[1]["logger"], lines[1]["level"]) == ("some.library", "warning")
    assert "RuntimeError: broken" in lines[2]["exception"]
    assert lines[0]["timestamp"].endswith("Z")


def test_text_is_for_people() -> None:
    text = run("console")
    assert "block_done" in text
    assert "job_id=job_1" in text
    assert "RuntimeError: broken" in text
