"""The adapter file: what was trained, as small as it was trained, with a one-file loader beside it.

    adapter.safetensors    tensors and, in its metadata, what they mean: see `workers.formats.load_adapter`
    load_adapter.py        puts it beside a model's linears, or into their weights
    report.json            of the job

Every job that trains an adapter keeps one. Stock peft has no type for pooled adapters nor for integer factors; where it
has, the `peft` checkpoint is the same adapter. The base is the `native` checkpoint of the same job, or another of its
checkpoints that holds the base alone; the original model is the wrong one.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from app.domain.report import Report
from workers.formats.load_adapter import FILE, FORMAT, PARTS, VERSION
from workers.formats.shards import write_json

LOADER = Path(__file__).with_name("load_adapter.py")
CARD = """\
# Adapter ({kind})

Trained by Bitwright {version} beside the quantized weights of the same job. It belongs to that base: the job's `native`
checkpoint, or another one of it that holds the base alone. On the original model it is wrong.

```python
from load_adapter import attach, merge

attach(model, "path/to/this/folder")    # beside the linears, or
merge(model, "path/to/this/folder")     # into their weights
```
"""


def write_adapter(
    folder: Path, kind: str, adapters: Mapping[str, tuple[Mapping[str, object], Mapping[str, Tensor]]]
) -> None:
    """One adapter folder, emptied first; `adapters` by module name, as `workers.adapters.attaching.stored` gives them.

    Raises:
        ValueError: an adapter has other tensors than its form says.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, (facts, parts) in adapters.items():
        if parts and parts.keys() != PARTS[str(facts["form"])]:
            raise ValueError(f"{name}: tensors {sorted(parts)} are not those of the form {facts['form']}")
        tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    linears = {name: dict(facts) for name, (facts, _) in adapters.items()}
    # One entry: safetensors writes several in an order of its own, and the same adapter shall be the same bytes.
    save_file(tensors, folder / FILE, {FORMAT: json.dumps({"version": VERSION, "kind": kind, "linears": linears})})
    shutil.copyfile(LOADER, folder / LOADER.name)


def describe_adapter(folder: Path, kind: str, report: Report) -> list[Path]:
    """Add the report and a card; all files of the folder."""
    write_json(folder / "report.json", report.model_dump(mode="json"))
    (folder / "README.md").write_text(CARD.format(kind=kind, version=report.version), encoding="utf-8")
    return sorted(file for file in folder.rglob("*") if file.is_file())
