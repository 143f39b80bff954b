#!/usr/bin/env bash
# huggingface_hub 2.4.0: where the server says that a repository does not exist (404, X-Error-Code: RepoNotFound), snapshot_download and
# `hf download` succeed, exit 0, if local_dir has any file in it, whatever that file is; only with an empty folder is it the
# RepositoryNotFoundError that one expects. A check in CI by the exit code does not notice that a model was deleted, renamed, or
# that its token has lost the right to read it. The client says so in a warning alone.
#
# Needs a network for the installation, then loopback only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile huggingface_hub==2.4.0
cat > "$folder/try.py" <<'PYTHON'
import importlib.metadata
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HOME"] = str(Path(sys.argv[1]) / "home")

from huggingface_hub import snapshot_download  # noqa: E402 - it reads its endpoint when it is imported

print("huggingface_hub", importlib.metadata.version("huggingface_hub"))
seen = {}
for name in ("an empty folder", "a folder with a note of mine"):
    target = Path(sys.argv[1]) / name
    target.mkdir()
    if "note" in name:
        (target / "note.txt").write_text("nothing of a model\n")
    try:
        snapshot_download("org/missing", local_dir=target)
        seen[name] = "succeeds"
    except Exception as error:
        seen[name] = type(error).__name__
    print(f"local_dir is {name}: {seen[name]}")
if seen != {"an empty folder": "RepositoryNotFoundError", "a folder with a note of mine": "succeeds"}:
    sys.exit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"

# Seen on 2026-11-30 (the warning is cut):
#
#   huggingface_hub 2.4.0
#   local_dir is an empty folder: RepositoryNotFoundError
#   Returning existing local_dir `...` as remote repo cannot be accessed in `snapshot_download` (404 Client Error. ...
#   local_dir is a folder with a note of mine: succeeds
