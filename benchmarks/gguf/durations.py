"""Seconds of jobs with llama.cpp's types against those of 4 bits for compressed-tensors, in turns on one device."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gguf.ours import Job, finished
from benchmarks.gguf.rows import MIXES, outer
from benchmarks.gguf.subject import Machine

LIGHT = {"method": "signround", "preset": "light"}
HEADER = "| job | seconds of each turn | median | ratio | with export | ratio |\n" + "| --- " * 6 + "|"


def durations(
    model: Path, machine: Machine, calibration: Mapping[str, Any], mixes: list[str], turns: int, folder: Path
) -> Iterator[str]:
    """Rows of a table. The first turn of each job warms it and is told, not counted."""
    plain = Job(model, {**LIGHT, "bits": 4, "group_size": 64}, machine.device, calibration, format="compressed-tensors")
    jobs = {"W4, groups of 64, compressed-tensors": plain}
    for mix in mixes:
        name = MIXES[mix][1]
        quantization = {**LIGHT, "scheme": name, "modules": outer(name)}
        jobs[f"{mix}, gguf"] = Job(model, quantization, machine.device, calibration)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(turns + 1):
        for name, job in jobs.items():
            made = machine.pool.submit(finished, job, folder).result()
            made.file.unlink()
            seconds[name].append((made.seconds, made.total))
    yield HEADER
    first = [median(each) for each in zip(*seconds[next(iter(jobs))][1:], strict=True)]
    for name, spent in seconds.items():
        work, total = (median(each) for each in zip(*spent[1:], strict=True))
        listed = ", ".join(f"{each[0]:.2f}" for each in spent[1:]) + f" (first {spent[0][0]:.2f})"
        yield f"| {name} | {listed} | {work:.2f} | {work / first[0]:.2f} | {total:.2f} | {total / first[1]:.2f} |"
