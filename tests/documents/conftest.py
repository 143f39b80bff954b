"""One live service for all documents, a small Hub on loopback that has the model of the examples, and texts."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli.embedded import EmbeddedService
from bitwright.endpoint import load_endpoint
from tests.child.hub_server import running_hub
from tests.cli.processes import clean_environment
from tests.documents.blocks import blocks_of, followed_by
from tests.documents.curl import curl_folder
from tests.documents.sessions import Session

MODEL = "HuggingFaceTB/SmolLM2-135M"
ADDRESS, KEY = "http://127.0.0.1:8080", "bw_..."
"""The service's address and a key as the documents write them."""


class Reader:
    """A reader of the documents, with a folder and a session for each."""

    def __init__(self, folder: Path, service: EmbeddedService, data: Path, model: Path) -> None:
        self._folder = folder
        self._model = model
        self._sessions: dict[Path, Session] = {}
        endpoint = load_endpoint(data)
        assert endpoint is not None
        assert endpoint.key is not None
        self._placeholders = {ADDRESS: service.url, KEY: endpoint.key}
        # curl's own default is to take a refusal for success.
        (folder / ".curlrc").write_text("fail\nsilent\nshow-error\n")
        self._environment = {
            **clean_environment(),
            "PATH": os.pathsep.join([*curl_folder(folder), *commands(), os.environ["PATH"]]),
            "BITWRIGHT_DATA_DIR": str(data),
            "CURL_HOME": str(folder),
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
        }

    def session(self, document: Path) -> Session:
        """The session of a document, in a folder with what the examples name."""
        if document not in self._sessions:
            folder = self._folder / document.stem / "work"
            folder.mkdir(parents=True)
            (folder / MODEL.partition("/")[2]).symlink_to(self._model)
            write_texts(folder)
            for earlier in followed_by(document):
                self._copy_results(earlier, folder)
            session = Session(blocks_of(document), folder, self._environment, self._placeholders)
            self._sessions[document] = session
        return self._sessions[document]

    def _copy_results(self, earlier: Path, folder: Path) -> None:
        """Run an earlier document to its end, and link the folders that it made."""
        self.session(earlier).reach_end()
        for made in sorted((self._folder / earlier.stem / "work").iterdir()):
            if made.is_dir() and not (folder / made.name).exists():
                (folder / made.name).symlink_to(made)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()


def commands() -> list[str]:
    """Folders of this environment's `bitwright` and `python3`."""
    import sys

    return [str(Path(sys.executable).parent)]


def write_texts(folder: Path) -> None:
    """Rows that calibrate and rows that are learned."""
    from workers.tiny_model import training_text

    text = training_text()
    rows = [text[start : start + 1500] for start in range(0, 300_000, 1500)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pairs = [{"prompt": row[:300], "completion": row[300:600]} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block with whole positions, so that defaults of requests hold."""
    from workers.tiny_model import Recipe, make_tiny_model

    recipe = Recipe(vocabulary=512, width=64, intermediate=128, blocks=1, steps=30, batch=2, length=64)
    return make_tiny_model(tmp_path_factory.mktemp("hub") / "model", recipe)


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Reader]:
    """A reader beside a live service whose Hub is on loopback."""
    folder, data = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("data")
    files = {path.name: path.read_bytes() for path in small_model.iterdir() if path.is_file()}
    with pytest.MonkeyPatch.context() as environment, running_hub() as hub:
        hub.repositories[f"models/{MODEL}"] = files
        environment.setenv("BITWRIGHT_HUB_ENDPOINT", hub.url)
        with EmbeddedService(data, device="cpu") as service:
            reading = Reader(folder, service, data, small_model)
            try:
                yield reading
            finally:
                reading.close()
