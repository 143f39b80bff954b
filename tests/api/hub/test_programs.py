"""Programs that read the Hub, each in a process of its own with `HF_ENDPOINT`: `hf`, transformers, peft; and clients of
other versions.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.bitwright.service import Service, running_service
from tests.tiny_model import CACHE, tiny_model_folder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
BODY = {"model": "org/model", "method": "rtn", "bits": 4}
SHARD = "200KB"
VERSIONS = ("0.36.2", "1.33.0", "2.4.0")
"""Versions of the client: the last ones of their lines when this was written. 0.36 asks for no tree."""

LOADS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
name, revision, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
ids = torch.tensor([tokenizer("the service quantizes")["input_ids"]])
save_file({"logits": model(ids).logits}, out)
"""
ADAPTS = """
import sys, torch
from safetensors.torch import save_file
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
name, revision, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), name, revision=revision)
save_file({"logits": model(torch.arange(8)[None]).logits}, out)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def job(service: Service, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job with a whole checkpoint, a sharded one, and an adapter: of a real tiny model."""
    whole, (sharded, adapter) = tiny_model_folder(), (tmp_path_factory.mktemp(n) for n in ("sharded", "adapter"))
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(sharded, max_shard_size=SHARD)
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    lora.save_pretrained(adapter)
    names = {"compressed-tensors": whole, "merged": sharded, "peft": adapter}
    fields = {"adapter": {"kind": "lora"}, "finetune": {"dataset": "builtin"}, "formats": list(names)}
    checkpoints = {name: files_of(folder) for name, folder in names.items()}
    checkpoints["merged"] = {**files_of(whole), **checkpoints["merged"]}
    del checkpoints["merged"]["model.safetensors"]
    assert sum(".safetensors" in path for path in checkpoints["merged"]) > 3
    return service.finished({**BODY, **fields, "name": "tiny"}, checkpoints)


def environment(service: Service, home: Path, key: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    asked = {"HF_ENDPOINT": f"{service.url}/hub", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **asked, **({} if key is None else {"HF_TOKEN": key})}


def run(command: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("revision", ["main", "merged"])
def test_transformers_loads_a_job_by_its_name(service: Service, job: str, tmp_path: Path, revision: str) -> None:
    env = environment(service, tmp_path, service.key)
    for name in ("jobs/tiny", f"jobs/{job}"):
        loaded = run([sys.executable, "-c", LOADS, name, revision, str(tmp_path / "logits")], env)
        assert loaded.returncode == 0, loaded.stderr
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    logits = load_file(tmp_path / "logits")["logits"]
    assert logits.shape[-1] == model.config.vocab_size


def test_peft_loads_the_adapter_of_a_job(service: Service, job: str, tmp_path: Path) -> None:
    env = environment(service, tmp_path, service.key)
    loaded = run([sys.executable, "-c", ADAPTS, "jobs/tiny", "peft", str(tmp_path / "logits")], env)
    assert loaded.returncode == 0, loaded.stderr
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder())(torch.arange(8)[None]).logits
    assert not torch.allclose(load_file(tmp_path / "logits")["logits"], plain)


def test_without_a_key_transformers_says_that_there_is_no_such_model(
    service: Service, job: str, tmp_path: Path
) -> None:
    no_model = "is not a local folder and is not a valid model identifier"
    for name, revision, key, told in (
        ("jobs/tiny", "main", None, no_model),
        ("gpt2", "main", service.key, no_model),
        ("jobs/tiny", "v9", service.key, "v9 is not a valid git identifier"),
    ):
        failed = run([sys.executable, "-c", LOADS, name, revision, "x"], environment(service, tmp_path, key))
        assert failed.returncode == 1
        assert told in failed.stderr, failed.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_hf_download_of_each_line_of_the_client(service: Service, job: str, tmp_path: Path, version: str) -> None:
    hf = client_of(version)
    env = environment(service, tmp_path, service.key)
    folder = tmp_path / "out"
    done = run([hf, "download", "jobs/tiny", "--revision", "merged", "--local-dir", str(folder)], env)
    assert done.returncode == 0, done.stdout + done.stderr
    got = {path: content for path, content in files_of(folder).items() if not path.startswith(".cache")}
    assert got == stored(service, job, "merged")
    elsewhere = ["--local-dir", str(tmp_path / "elsewhere")]  # where nothing is that the client would make do with
    no_key = run([hf, "download", "jobs/tiny", *elsewhere], environment(service, tmp_path, None))
    assert no_key.returncode != 0
    assert "not found" in (no_key.stdout + no_key.stderr).lower(), no_key.stdout + no_key.stderr
    wrong = run([hf, "download", "jobs/tiny", "--revision", "v9", *elsewhere], env)
    assert wrong.returncode != 0
    assert "revision" in (wrong.stdout + wrong.stderr).lower()


def stored(service: Service, job: str, name: str) -> dict[str, bytes]:
    """The files of a checkpoint as /v1/artifacts sends them."""
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}) as http:
        items = http.get(f"/v1/jobs/{job}/artifacts").json()["items"]
        return {
            item["path"]: http.get(f"/v1/artifacts/{item['id']}/content").content
            for item in items
            if item["format"] == name
        }


def client_of(version: str) -> str:
    """The `hf` of a version, in an environment that is made once and kept beside the tiny model."""
    folder = Path(os.environ.get("BITWRIGHT_TEST_CACHE", CACHE)) / f"huggingface_hub-{version}"
    hf = folder / "bin" / "hf"
    if not hf.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", f"huggingface_hub=={version}"]
        subprocess.run(install, check=True, timeout=300)
    return str(hf)
