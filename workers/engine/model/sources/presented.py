"""A folder that looks like the checkpoint of a quantized source, without its weights.

Everything that a job takes over from its source besides weights it takes from a folder: the configuration, the
tokenizer, the licence, the card. Of a quantized source that folder is written here, so that no reader of it needs to
know that the weights came in another form.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.formats.shards import write_json
from workers.formats.source_files import COPIED, copy_files

CARD = "README.md"


class PresentedFolder:
    """A folder with config.json and what `fill` adds.

    scratch   where it goes, under the source's own name; None: to a temporary folder, which goes with this object
    """

    def __init__(
        self, source: Path, config: Mapping[str, Any], scratch: Path | None, fill: Callable[[Path], None]
    ) -> None:
        if scratch is None:
            scratch = Path(tempfile.mkdtemp(prefix="bitwright-source-"))
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        self.path = scratch / source.name
        self.path.mkdir(parents=True)
        copy_files(source, self.path, COPIED)
        copy_files(source, self.path, (CARD,))
        fill(self.path)
        write_json(self.path / "config.json", config)
