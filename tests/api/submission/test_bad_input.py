"""Everything wrong that can be seen at POST: each gets its 4xx problem with field, value and way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import shorten
from tests.api.checkpoints import CONFIG, with_header, write_checkpoint, write_index
from tests.api.conftest import SHORTHAND, Api, problem

BODIES: list[tuple[str, Any, str, str]] = [
    ("unknown method", {**SHORTHAND, "method": "magic"}, "unknown_method", "method"),
    ("bits 0", {**SHORTHAND, "bits": 0}, "out_of_range", "bits"),
    ("bits 9", {**SHORTHAND, "bits": 9}, "out_of_range", "bits"),
    ("bits 1.5", {**SHORTHAND, "bits": 1.5}, "wrong_type", "bits"),
    ("bits true", {**SHORTHAND, "bits": True}, "wrong_type", "bits"),
    (
        "6 bits in a format without them",
        {**SHORTHAND, "bits": 6, "symmetric": False, "formats": ["gguf"]},
        "format_cannot_hold",
        "bits",
    ),
    ("an adapter where none is made", {**SHORTHAND, "formats": ["peft"]}, "format_cannot_hold", "formats.0"),
    ("unknown field", {**SHORTHAND, "bit": 4}, "unknown_field", "bit"),
    ("unknown field below", {**SHORTHAND, "calibration": {"samples": 1}}, "unknown_field", "calibration.samples"),
    ("no model", {"method": "rtn"}, "missing_field", "model"),
    ("no method", {"model": "org/model"}, "missing_field", "method"),
    ("no Hub id", {**SHORTHAND, "model": "org/../model"}, "invalid_value", "model"),
    ("NUL in a text", {**SHORTHAND, "metadata": {"a": "b\0"}}, "invalid_value", "metadata.a"),
    ("too many labels", {**SHORTHAND, "metadata": {str(i): "" for i in range(17)}}, "out_of_range", "metadata"),
]


@pytest.mark.parametrize(("body", "code", "field"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_bad_body_names_field_and_problem(api: Api, body: Any, code: str, field: str) -> None:
    found = problem(api.client.post("/v1/jobs", json=body), 422, "invalid_request")
    errors = found.get("errors") or [{**found, "field": found["field"]}]
    assert isinstance(errors, list)
    assert (code, field) in [(error["code"], error["field"]) for error in errors], found
    assert all(len(error["detail"]) > 10 for error in errors)
    assert api.client.get("/v1/jobs").json()["items"] == []


def test_all_problems_come_at_once(api: Api) -> None:
    body = {"model": 7, "method": "rtn", "bits": 9, "seed": -1, "colour": "red"}
    found = problem(api.client.post("/v1/jobs", json=body), 422, "invalid_request")
    assert isinstance(found["errors"], list)
    assert {"model", "bits", "seed", "colour"} <= {error["field"] for error in found["errors"]}


@pytest.mark.parametrize("body", [[], "text", 7, None])
def test_a_body_is_an_object(api: Api, body: Any) -> None:
    problem(api.client.post("/v1/jobs", json=body), 422, "invalid_request")


@pytest.mark.parametrize("text", ["{", '{"a": 1,}', "\x80", "[" * 100_000, ""])
def test_a_body_is_json(api: Api, text: str) -> None:
    response = api.client.post("/v1/jobs", content=text.encode("latin-1"), headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    problem(response, response.status_code, "invalid_request" if text == "" else "malformed_body")


def test_a_large_body_is_refused(api: Api) -> None:
    body = json.dumps({**SHORTHAND, "metadata": {"a": "x" * 10_000_000}})
    found = problem(api.client.post("/v1/jobs", content=body), 413, "body_too_large")
    assert "uploads" in str(found["hint"])

    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100_000

    problem(api.client.post("/v1/jobs", content=chunks()), 413, "body_too_large")


def _bin_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _tiny(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"1234")


def _header_longer_than_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(with_header({}, 0, claimed=1 << 20))


def _header_of_all_memory(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(with_header({}, 0, claimed=2**63))


def _offsets_beyond_the_file(folder: Path) -> None:
    entry = {"dtype": "BF16", "shape": [1 << 20], "data_offsets": [0, 1 << 21]}
    (folder / "model.safetensors").write_bytes(with_header({"a": entry}, 64))


def _overlap(folder: Path) -> None:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    (folder / "model.safetensors").write_bytes(with_header({"a": entry, "b": entry}, 8))


def _shape_that_lies(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 8]}
    (folder / "model.safetensors").write_bytes(with_header({"a": entry}, 8))


def _not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")


def _sharded(weight_map: dict[str, object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        write_index(folder, weight_map)

    return spoil


def _adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _link_out(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        secret = folder.parent.parent / "secret"
        (folder / name).rename(secret)
        (folder / name).symlink_to(secret)

    return spoil


def _config(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return spoil


def _changed(**fields: object) -> Callable[[Path], None]:
    return _config(json.dumps({**CONFIG, **fields}))


CHECKPOINTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("only pickled weights", _bin_only, "unsafe_checkpoint", "pytorch_model.bin"),
    ("truncated", _truncated, "corrupt_checkpoint", "truncated"),
    ("shorter than a header's length", _tiny, "corrupt_checkpoint", "truncated"),
    ("header longer than the file", _header_longer_than_file, "corrupt_checkpoint", "1048576"),
    ("header as large as memory", _header_of_all_memory, "corrupt_checkpoint", "9223372036854775808"),
    ("offsets beyond the file", _offsets_beyond_the_file, "corrupt_checkpoint", "promises"),
    ("tensors that overlap", _overlap, "corrupt_checkpoint", "overlaps"),
    ("shape that lies", _shape_that_lies, "corrupt_checkpoint", "does not fill"),
    ("header that is not JSON", _not_json, "corrupt_checkpoint", "not JSON"),
    ("index out of the folder", _sharded({"a": "../../secret.safetensors"}), "corrupt_checkpoint", "own folder"),
    ("absolute index", _sharded({"a": "/etc/passwd"}), "corrupt_checkpoint", "own folder"),
    ("index of pickles", _sharded({"a": "model.bin"}), "corrupt_checkpoint", "own folder"),
    ("index of a missing file", _sharded({"a": "model-2.safetensors"}), "corrupt_checkpoint", "missing"),
    ("index that lies", _sharded({"a": "model-00001-of-00001.safetensors"}), "corrupt_checkpoint", "does not"),
    ("index of nothing", _sharded({}), "corrupt_checkpoint", "weight_map"),
    ("an adapter beside the model", _adapter_beside, "corrupt_checkpoint", "adapter_config.json"),
    ("weights of another name", _changed(transformers_weights="x.safetensors"), "corrupt_checkpoint", "x.safetensors"),
    ("link out of the roots", _link_out("model.safetensors"), "source_forbidden", "model.safetensors is a link"),
    ("tokenizer out of the roots", _link_out("tokenizer.json"), "source_forbidden", "tokenizer.json is a link"),
    ("no config", lambda folder: (folder / "config.json").unlink(), "corrupt_checkpoint", "config.json"),
    ("config is not JSON", _config("{"), "corrupt_checkpoint", "config.json"),
    ("quantized already", _changed(quantization_config={}), "unsupported_architecture", "quantized already"),
    ("layers of a hostile config", _changed(num_hidden_layers=10**9), "corrupt_checkpoint", "num_hidden_layers"),
    ("width that is no number", _changed(hidden_size="wide"), "corrupt_checkpoint", "hidden_size"),
    ("group that does not divide", _changed(intermediate_size=100), "group_size_does_not_divide", "mlp.down_proj"),
]


@pytest.mark.parametrize(
    ("spoil", "code", "says"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS]
)
def test_a_bad_checkpoint_is_refused(api: Api, spoil: Callable[[Path], None], code: str, says: str) -> None:
    folder = write_checkpoint(api.folder / "models" / "bad")
    assert api.client.post("/v1/jobs?dry_run=true", json={**SHORTHAND, "model": str(folder)}).status_code == 200
    spoil(folder)
    found = problem(api.client.post("/v1/jobs", json={**SHORTHAND, "model": str(folder)}), 422, code)
    assert says in str(found["detail"])
    assert found["errors"]
    assert api.client.get("/v1/jobs").json()["items"] == []


def test_a_type_that_is_not_accepted_is_refused_where_the_method_needs_a_model(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "bad")
    _changed(model_type="unheard_of")(folder)
    body = {**SHORTHAND, "model": str(folder), "formats": ["merged"]}
    found = problem(api.client.post("/v1/jobs", json={**body, "method": "gptq"}), 422, "unsupported_architecture")
    assert "llama" in str(found["detail"])
    assert "GET /v1/architectures" in json.dumps(found["errors"])
    assert api.client.get("/v1/jobs").json()["items"] == []


def test_an_override_that_does_not_divide_is_named(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    modules = {"overrides": {"*.down_proj": {"group_size": 128}, "*.typo_proj": {"bits": 8}}}
    body = {"model": str(folder), "quantization": {"method": "rtn", "modules": modules}}
    found = problem(api.client.post("/v1/jobs", json=body), 422, "invalid_request")
    assert isinstance(found["errors"], list)
    assert {(error["field"], error["code"]) for error in found["errors"]} == {
        ("quantization.modules.overrides.*.down_proj.group_size", "group_size_does_not_divide"),
        ("quantization.modules.overrides.*.typo_proj", "unknown_module"),
    }


@pytest.mark.parametrize(
    ("path", "code", "says"),
    [
        ("/etc", "source_forbidden", "BITWRIGHT_MODEL_ROOTS"),
        ("{models}/../secret", "source_forbidden", "BITWRIGHT_MODEL_ROOTS"),
        ("{models}x", "source_forbidden", "BITWRIGHT_MODEL_ROOTS"),
        ("{models}/link", "source_forbidden", "BITWRIGHT_MODEL_ROOTS"),
        ("./models", "source_forbidden", "absolute"),
        ("{models}/none", "source_not_found", "nothing at"),
        ("{models}/file", "source_not_found", "folder"),
        ("{models}/" + 300 * "x", "source_not_found", "nothing at"),
    ],
)
def test_a_path_must_lie_under_a_root_and_be_there(api: Api, path: str, code: str, says: str) -> None:
    models = api.folder / "models"
    write_checkpoint(api.folder / "modelsx")
    (models / "link").symlink_to(api.folder / "modelsx")
    (models / "file").write_text("")
    given = path.format(models=models)
    found = problem(api.client.post("/v1/jobs", json={**SHORTHAND, "model": given}), 422, code)
    assert (found["field"], found["value"]) == ("model.path", shorten(given))
    assert says in str(found["detail"])


def test_texts_are_checked_too(api: Api) -> None:
    body = {
        **SHORTHAND,
        "calibration": {"dataset": "/etc/passwd"},
        "evaluation": {"dataset": {"source": "upload", "id": "upl_" + "0" * 26}},
    }
    found = problem(api.client.post("/v1/jobs", json=body), 422, "invalid_request")
    assert isinstance(found["errors"], list)
    assert {(error["field"], error["code"]) for error in found["errors"]} == {
        ("calibration.dataset.path", "source_forbidden"),
        ("evaluation.dataset.id", "source_not_found"),
    }


def test_another_tenants_ids_do_not_exist(api: Api) -> None:
    job_id = api.submit()
    api.succeed(api.claim(), {"native": {"a.bin": b"secret"}})
    artifact_id = api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"][0]["id"]
    files = [{"name": "t.jsonl", "size": 1, "sha256": "0" * 64}]
    upload_id = api.client.post("/v1/uploads", json={"files": files}).json()["id"]
    calls = [
        ("GET", f"/v1/jobs/{job_id}"),
        ("DELETE", f"/v1/jobs/{job_id}"),
        ("POST", f"/v1/jobs/{job_id}/cancel"),
        ("POST", f"/v1/jobs/{job_id}/retry"),
        ("GET", f"/v1/jobs/{job_id}/events"),
        ("GET", f"/v1/jobs/{job_id}/artifacts"),
        ("GET", f"/v1/jobs/{job_id}/archive"),
        ("GET", f"/v1/artifacts/{artifact_id}/content"),
        ("GET", f"/v1/uploads/{upload_id}"),
        ("DELETE", f"/v1/uploads/{upload_id}"),
        ("PUT", f"/v1/uploads/{upload_id}/files/t.jsonl"),
        ("POST", f"/v1/uploads/{upload_id}/complete"),
    ]
    for method, url in calls:
        problem(api.stranger.request(method, url), 404, "not_found")
    assert api.stranger.head(f"/v1/artifacts/{artifact_id}/content").status_code == 404
    assert api.stranger.head(f"/v1/uploads/{upload_id}/files/t.jsonl").status_code == 404
    stream = api.stranger.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    problem(stream, 404, "not_found")
    used = api.stranger.post("/v1/jobs", json={**SHORTHAND, "model": upload_id})
    assert problem(used, 422, "source_not_found")["field"] == "model.id"


@pytest.mark.parametrize("job_id", ["job_1", "job_%00", "..", "job_" + "z" * 5000, "art_" + "0" * 26, "💥"])
def test_ids_that_are_none_are_not_found(api: Api, job_id: str) -> None:
    assert api.client.get(f"/v1/jobs/{job_id}").status_code == 404


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_changed(model_type="gpt_neo"), "gpt_neo is none of them"),
        (_changed(intermediate_size=80), "has 80 inputs"),
        (_changed(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (_changed(model_type="mistral", sliding_window=32), "sliding_window = 32"),
        (_changed(model_type="qwen3", attention_bias=True), "attention_bias = True"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused(api: Api, spoil: Callable[[Path], None], says: str) -> None:
    folder = write_checkpoint(api.folder / "models" / "other")
    spoil(folder)
    body = {**SHORTHAND, "model": str(folder), "group_size": -1}
    assert api.client.post("/v1/jobs?dry_run=true", json=body | {"formats": ["merged"]}).status_code == 200
    found = problem(api.client.post("/v1/jobs", json=body | {"formats": ["merged", "gguf"]}), 422, "format_cannot_hold")
    assert says in str(found["detail"])
    assert found["field"] == "formats.1"


def test_an_adapter_that_does_not_fit_is_refused_with_what_does(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    body = {"model": str(folder), "method": "qa-hira", "group_size": 16, "finetune": {"dataset": "builtin"}}
    fitting = api.client.post("/v1/jobs?dry_run=true", json=body).json()
    assert fitting["request"]["adapter"]["kind"] == "qa-hira"
    assert fitting["estimates"]["adapter_parameters"] > 0
    body["adapter"] = {"pool_in": 24}
    found = problem(api.client.post("/v1/jobs", json=body), 422, "misaligned_adapter")
    assert found["field"] == "adapter.pool_in"
    assert "use one of 16, 32, 64" in str(found["detail"])


def test_a_text_to_learn_from_must_be_readable(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    body = {"model": str(folder), "method": "qlora", "finetune": {"dataset": "/etc/passwd"}}
    found = problem(api.client.post("/v1/jobs", json=body), 422, "source_forbidden")
    assert found["field"] == "finetune.dataset.path"
