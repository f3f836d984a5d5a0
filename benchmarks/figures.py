"""How each benchmark tells what it has measured: a line for people, and a line of JSON for `run.py`.

    report("batch", rows=1000, seconds=3.2, cpu_seconds=1.9, memory_mb=121)

The unit is the last word of a figure's name. Where the environment variable BENCHMARK_FIGURES names a file, the same is
added to it as one line of JSON, with the machine's load.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")  # every program imports this before Prefect

FILE = "BENCHMARK_FIGURES"
TICK = os.sysconf("SC_CLK_TCK")


def report(what: str, **figures: Any) -> None:
    """Tell what was measured. Dictionaries among the figures are for the JSON alone."""
    load = round(os.getloadavg()[0], 1)
    shown = [f"{name.replace('_', ' ')} {number(value)}" for name, value in figures.items() if _is_shown(value)]
    print(f"  {what}: {', '.join(shown)} (load {load})", flush=True)
    if path := os.environ.get(FILE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "load": load, **figures}) + "\n")


def _is_shown(value: Any) -> bool:
    return isinstance(value, int | float | str)


def number(value: Any) -> str:
    """Return a figure for people: three digits that count, or whole."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def lags(seconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Return the median, the 95th percentile and the longest of some times."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    names = ("p50_seconds", "p95_seconds", "longest_seconds")
    return dict(zip((f"{prefix}{name}" for name in names), (cuts[49], cuts[94], max(seconds)), strict=True))


@dataclass
class Used:
    """What a block of code took: wall time, and CPU time of this process."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Return it for `report`, with the peak of this process's memory so far."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "memory_mb": peak_mb()}


@contextmanager
def used() -> Iterator[Used]:
    """Measure a block of code."""
    found, began, cpu = Used(), time.perf_counter(), time.process_time()
    yield found
    found.seconds, found.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu


def process_status(pid: int | str = "self") -> dict[str, str]:
    """Return /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def peak_mb(pid: int | str = "self") -> float:
    """Return the peak of a process's memory."""
    return int(process_status(pid)["VmHWM"].split()[0]) / 1024


def memory_mb(pid: int | str = "self") -> float:
    """Return the memory of a process now."""
    return int(process_status(pid)["VmRSS"].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    return sum(map(int, _stat(pid)[11:15])) / TICK


def family_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of all that descends from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    family, total = [pid], 0.0
    while family:
        one = family.pop()
        family += parents.get(one, [])
        total += sum(map(int, _stat(one)[11:15])) / TICK
    return total


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return []
