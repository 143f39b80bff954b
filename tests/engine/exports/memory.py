"""`python -m tests.engine.exports.memory NATIVE WORKSPACE FORMAT...`: an export, watched from inside.

Prints JSON: the most anonymous memory (RssAnon) above that of the process before it began, bytes made, and seconds.
"""

import json
import sys
import threading
from pathlib import Path

from tests.engine.exports.orders import export
from tests.engine.weights_only.memory import anonymous, taken


def main(native: Path, workspace: Path, formats: list[str]) -> None:
    before, done = anonymous(), threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = export(native, workspace, formats)
    done.set()
    watcher.join()
    made = taken(workspace / "output")
    json.dump({"anonymous": peak, "made": made, "seconds": result.report.seconds["total"]}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
