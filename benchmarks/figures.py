"""How a benchmark reports its figures: a line for people, and a line of JSON for bench.py.

The unit is the last word of a figure's name. Every program imports this module before Prefect and before `support`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for `from support… import …`

FILE = "BENCHMARK_FIGURES"
"""The environment variable with the file to which bench.py wants the figures."""
TICK = os.sysconf("SC_CLK_TCK")


def report(what: str, **figures: Any) -> None:
    """Print figures. A text is for the JSON alone."""
    load = round(os.getloadavg()[0], 1)
    values = ((name, value) for name, value in figures.items() if not isinstance(value, str))
    shown = (f"{name.replace('_', ' ')} {number(value)}" for name, value in values)
    print(f"  {what}: {', '.join(shown)} (load {load})", flush=True)
    if path := os.environ.get(FILE):
        Path(path).write_text(json.dumps({"load": load, **figures}), encoding="utf-8")


def number(value: float) -> str:
    """Return a figure for people: three digits that count, or whole."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@dataclass
class Used:
    """What a block of code took: wall time, and CPU time of this process."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def used() -> Iterator[Used]:
    """Measure a block of code."""
    figures, began, cpu = Used(), time.perf_counter(), time.process_time()
    yield figures
    figures.seconds, figures.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu


def memory_mb(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Return the memory of a process now, or its peak: VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of all that descends from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    family, total = [pid], 0.0
    while family:
        member = family.pop()
        family += parents.get(member, [])
        total += sum(map(int, _stat(member)[11:15])) / TICK
    return total


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return []
