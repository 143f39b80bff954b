"""Files of the code map that are described by hand: those that no docstring describes, by path."""

from types import MappingProxyType

FILES = MappingProxyType(
    {
        ".ci/run": "What must hold before a change lands",
        ".github/actions/bitwright-check/action.yml": "GitHub Action: `bitwright check`",
        ".pre-commit-config.yaml": "Git hooks, offline",
        "AGENTS.md": "House rules for whoever writes code here, in short",
        "CHANGELOG.md": "What changed, for users",
        "Dockerfile": "Targets `api` (no torch) and `worker`",
        "Makefile": "Every command of the project: `make help`",
        "alembic.ini": "Where Alembic finds the migrations",
        "constraints.txt": "The exact versions that the tests run with",
        "docker-compose.yml": "PostgreSQL, Valkey, migrate, api, worker, sweep",
        "pyproject.toml": "Packages, extras, and the settings of every tool",
        "requirements-vllm.txt": "What `make test-vllm` installs",
        "docs/adding-a-format.md": "The two touches of a new format",
        "docs/index.md": "All pages, grouped by what a reader wants to do",
        "docs/security.md": "What a stranger's job may do, and the limits of what reads it",
        "docs/quickstart.md": "From nothing to a quantized checkpoint",
        "docs/code-map.md": "Seven files to read first, and this tree",
        "docs/papers.md": "Per paper, the request that reproduces its row and our figure",
        "docs/changelog.md": "CHANGELOG.md as a page of the site",
        "docs/guides/quantize.md": "Method, scheme, format and calibration text",
        "docs/guides/goals.md": "A distance, a size or a machine in place of bits",
        "docs/guides/evaluate.md": "Tasks with known answers, noise, mixtures of calibration text",
        "docs/guides/finetune.md": "Adapters, merges, training that starts from a base job",
        "docs/guides/load.md": "transformers, peft, vLLM, llama.cpp",
        "docs/guides/verify.md": "Runtimes that try the result before and after it is made",
        "docs/guides/dashboard.md": "Pages for people, and the report as a file",
        "docs/guides/http.md": "The API with curl",
        "docs/guides/python.md": "The client",
        "docs/guides/hub.md": "`hf`, transformers and others on finished jobs",
        "docs/guides/ci.md": "Exit codes, requirements, repeated requests",
        "docs/reference/methods.md": "Methods, presets, recipes, adapters, architectures",
        "docs/reference/formats.md": "Formats and the runtimes that load them",
        "docs/reference/settings.md": "Every environment variable",
        "docs/reference/errors.md": "Every error code and its way out",
        "docs/adding-a-method.md": "The four touches of a new method",
        "docs/tenants.md": "Quotas, keys, Hub tokens, use, the audit log and metrics of tenants",
        "docs/alerts.yml": "Example alert rules for Prometheus, each with a line of what to do",
        "docs/operations.md": "Scaling, backup, upgrades, security, what happens when something dies",
        "docs/results.md": "Measured figures and how to reproduce them",
        "docs/datasets.md": "Rows of datasets: which fields are read, what is learned of them, and what is refused",
    }
)
"""Files that cannot describe themselves."""
