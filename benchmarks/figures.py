"""How a benchmark is told what to measure, and reports figures: a line for people, and JSON for bench.py.

The unit is the last word of a figure's name. Every program imports this module before Prefect and before `support`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.processes import Process

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for `from support… import …`

FILE = "BENCHMARK_FIGURES"
"""The environment variable with the file to which bench.py wants the figures."""


def options_of(doc: str | None, *what: str, **defaults: Any) -> argparse.Namespace:
    """Read the command line: one of the words of `what`, and options with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if what:
        parser.add_argument("what", choices=what)
    for name, default in defaults.items():
        kind: Any = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    return parser.parse_args()


def report(what: str, **figures: Any) -> None:
    """Print figures. A text is for the JSON alone."""
    values = ((name, value) for name, value in figures.items() if not isinstance(value, str))
    shown = (f"{name.replace('_', ' ')} {number(value)}" for name, value in values)
    print(f"  {what}: {', '.join(shown)} (load {os.getloadavg()[0]:.1f})", flush=True)
    if path := os.environ.get(FILE):
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def number(value: float) -> str:
    """Return a figure for people: three digits that count, or whole."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@contextmanager
def used(seconds: list[float], cpu: list[float] | None = None) -> Iterator[None]:
    """Append the wall time of a block of code, and the CPU time of this process."""
    began, cpu_began = time.perf_counter(), time.process_time()
    yield
    seconds.append(time.perf_counter() - began)
    if cpu is not None:
        cpu.append(time.process_time() - cpu_began)


def memory_mb(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Return the memory of a process now, or its peak: VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def cpu_seconds(process: Process) -> float:
    """Return the CPU time of a process and of all that descends from it."""
    total = 0
    for pid in process.family():
        with suppress(OSError):  # it has just ended
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return total / os.sysconf("SC_CLK_TCK")
