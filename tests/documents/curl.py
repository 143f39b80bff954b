"""The `curl` of the documents: the machine's own, or, where it has none, a stand-in that knows the options they use.

Python, pip and make are all that the tests may ask of a machine.
"""

import argparse
import shutil
import sys
from pathlib import Path

import httpx


def curl_folder(folder: Path, *, always: bool = False) -> list[str]:
    """A folder for PATH with the stand-in in it; none where the machine has a curl, unless it is wanted `always`."""
    if shutil.which("curl") is not None and not always:
        return []
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    script = bin_folder / "curl"
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{__file__}' \"$@\"\n")
    script.chmod(0o755)
    return [str(bin_folder)]


def main(arguments: list[str]) -> int:
    """Do what these options of curl mean; options that no document uses are refused."""
    parser = argparse.ArgumentParser(prog="curl", allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    parser.add_argument("--data-binary", dest="file")
    parser.add_argument("-o", dest="output")
    parser.add_argument("-C", dest="resume", choices=["-"])
    for flag in ("-I", "-N", "-f", "-s", "-sS"):
        parser.add_argument(flag, action="store_true", dest=flag.strip("-"))
    given = parser.parse_args(arguments)
    body = given.data.encode() if given.data is not None else None
    if given.file is not None:
        body = Path(given.file.removeprefix("@")).read_bytes()
    headers = dict(header.split(": ", 1) for header in given.headers)
    output = None if given.output is None else Path(given.output)
    start = output.stat().st_size if given.resume and output is not None and output.exists() else 0
    headers |= {"Range": f"bytes={start}-"} if start else {}
    method = given.method or ("HEAD" if given.I else "GET" if body is None else "POST")
    with httpx.stream(method, given.url, headers=headers, content=body, timeout=300) as answer:
        if answer.status_code == 416 and answer.headers.get("content-range") == f"bytes */{start}":
            return 0  # all of it is there
        if answer.is_error:
            sys.stderr.write(f"curl: (22) the service answered {answer.status_code}\n{answer.read().decode()}\n")
            return 22  # as with -f, which the documents' tests have always
        sink = sys.stdout.buffer if output is None else output.open("ab" if start else "wb")
        if given.I:
            sink.write(f"HTTP/1.1 {answer.status_code}\n{answer.headers}\n".encode())
        for chunk in answer.iter_bytes():
            sink.write(chunk)
        sink.flush()
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
