#!/usr/bin/env bash
# @huggingface/jinja 0.5.11, which renders chat templates in JavaScript (transformers.js and node-llama-cpp depend on it), and jinja2 3.1.6, which
# does in Python: one guesses that a template without filters of its own means one prompt. `strip`, `lstrip` and `rstrip` take the
# characters to remove, and templates of models that think call them so, to take newlines off around a thought: content.lstrip('\n').
# JavaScript's ignores the argument and removes all white space: an answer that begins with indented code loses the indentation of its
# first line, and only that, and a prefix or suffix of other characters is kept. Nothing is raised. What a model was trained, calibrated or
# measured on in Python is another prompt there, from the second turn on.
#
# Needs Node.js, and a network for the installation only. Exits non-zero if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-compile jinja2==3.1.6
(cd "$folder" && npm install --silent --no-fund --no-audit --save-exact @huggingface/jinja@0.5.11)
cat > "$folder/render.mjs" <<'JAVASCRIPT'
import { readFileSync } from "node:fs";
import { Template } from "@huggingface/jinja";

const { template, rows } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(rows.map((row) => new Template(template).render(row))));
JAVASCRIPT
cat > "$folder/try.py" <<'PYTHON'
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

folder = Path(sys.argv[1])
installed = json.loads((folder / "node_modules/@huggingface/jinja/package.json").read_text())["version"]
print("jinja2", version("jinja2"), "@huggingface/jinja", installed)


def in_python(template: str, rows: list[dict]) -> list[str]:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return [made.render(row) for row in rows]


def in_javascript(template: str, rows: list[dict]) -> list[str]:
    asked = json.dumps({"template": template, "rows": rows})
    ran = subprocess.run(["node", folder / "render.mjs"], input=asked, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(ran.stdout)


code = "<think>\nindent it\n</think>\n\n    return 1\n    # done\n"
expected = {
    "{{ said.split('</think>')[-1].lstrip('\\n') }}": ("    return 1\n    # done\n", "return 1\n    # done\n"),
    "{{ 'two spaces:  \\n'.rstrip('\\n') }}|": ("two spaces:  |", "two spaces:|"),
    "{{ '[1, 2]'.strip('[]') }}": ("1, 2", "[1, 2]"),
    "{{ '  a  '.strip() }}": ("a", "a"),
}
right = True
for template, (python, javascript) in expected.items():
    (here,), (there,) = in_python(template, [{"said": code}]), in_javascript(template, [{"said": code}])
    print(f"{template}\n    Python     {here!r}\n    JavaScript {there!r}")
    right &= (here, there) == (python, javascript)
sys.exit(0 if right else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/try.py" "$folder"
