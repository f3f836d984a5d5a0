"""Measure what has a goal, and print a table: figures, goals, and the machine's load. README.md says how.

It starts what it needs: Prefect servers with Prefect's own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from figures import FILE, cpu_seconds, number

from support.environment import isolated
from support.postgres import Postgres, find_postgres
from support.prefect_server import QUICK, PrefectServer

HERE = Path(__file__).parent
Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table. A value meets a goal that it is not above; `parts` is what the value is made of."""

    work: str
    figure: str
    value: float
    goal: float | None = None
    parts: str = ""

    def line(self) -> str:
        goal = "" if self.goal is None else f"{self.goal:g}, {'met' if self.value <= self.goal else '**missed**'}"
        return f"| {self.work} | {self.figure} | {number(self.value)} | {goal} | {self.parts} |"


class DurablePostgres(Postgres):
    """PostgreSQL with its own defaults: that of the tests does not wait for the disk."""

    NOT_DURABLE = ()


class Bench:
    """Runs measurements, tiny ones if `small`, and starts the servers that they need; all end with the stack.

    A Prefect server named `postgres` and its crew database are on PostgreSQL, and all are with `on_postgres`.
    """

    def __init__(self, stack: contextlib.ExitStack, *, small: bool, on_postgres: bool) -> None:
        self.small = small
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefect-crew-bench-")))
        self._on_postgres = on_postgres
        self._postgres: Postgres | None = None
        self._servers: dict[str, PrefectServer] = {}
        self._crew_databases: dict[str, str] = {}

    def server(self, name: str) -> PrefectServer:
        """Start a Prefect server, with a crew database of its own."""
        if name not in self._servers:
            url, crew_url = None, f"sqlite:///{self._folder / name / 'crew.db'}"
            if self._on_postgres or name == "postgres":
                if self._postgres is None:
                    programs = find_postgres() or sys.exit(
                        "PostgreSQL's programs are missing (apt-get install postgresql)."
                    )
                    self._postgres = self._stack.enter_context(DurablePostgres(programs))
                url, crew_url = (self._postgres.create_database(f"{kind}_{name}") for kind in ("prefect", "crew"))
            self._crew_databases[name] = crew_url
            server = self._servers[name] = PrefectServer(self._folder / name, database_url=url)
            self._stack.callback(server.stop)
            with patch.dict(QUICK, clear=True):  # which are settings of the tests
                server.start()
        return self._servers[name]

    def measure(self, script: str, *arguments: object, on: str = "server") -> Figures:
        """Run a benchmark against a server; return its figures, and the server's CPU seconds."""
        folder, server = self._folder / f"work-{time.monotonic_ns()}", self.server(on)
        folder.mkdir()
        self._calm_down(server)
        before = cpu_seconds(server.process)
        env = {
            FILE: str(folder / "figures"),
            "PREFECT_API_URL": server.api_url,
            "PREFECT_INTEGRATIONS_CREW_DATABASE_URL": self._crew_databases[on],
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "PYTHONDONTWRITEBYTECODE": "",  # what is imported is compiled once, and not in each measurement
        }
        command = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
        env = isolated(folder / "home", env)
        done = subprocess.run(command, env=env, timeout=5400, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        self._calm_down(server)
        figures = json.loads((folder / "figures").read_text())
        return {**figures, "server_cpu_seconds": cpu_seconds(server.process) - before}

    def _calm_down(self, server: PrefectServer) -> None:
        """Wait until a server rests, for a minute: it records late what a flow has left behind."""
        deadline, cpu = time.monotonic() + (0 if self.small else 60), -1.0
        while time.monotonic() < deadline and (now := cpu_seconds(server.process)) - cpu > 0.2:
            cpu = now
            time.sleep(1)

    def alternately(self, *ways: Sequence[object], on: Sequence[str] = ("server", "server")) -> Iterable[Figures]:
        """Measure several ways in turn, so that all meet the same machine; return the medians of each."""
        several: list[list[Figures]] = [[] for _ in ways]
        for _ in range(1 if self.small else 3):
            for way, server, measured in zip(ways, on, several, strict=False):
                measured.append(self.measure(str(way[0]), *way[1:], on=server))
        for measured in several:
            numbers = (name for name, value in measured[0].items() if isinstance(value, int | float))
            yield measured[0] | {name: median(one[name] for one in measured) for name in numbers}


def run(bench: Bench) -> list[Row]:
    (figures,) = bench.alternately(("run", "--seconds", 0.5 if bench.small else 2.0))
    work = "one run"
    shown = f"{figures['files']:g} files, {figures['asyncio_tasks']:g} asyncio tasks"
    return [
        Row(work, "functions of ours entered", figures["functions"], 130, shown),
        Row(work, "requests to Prefect, in a flow that runs", figures["requests"], 3, figures["kinds"]),
        Row(work, "on top of the crew's own time, s", figures["extra_seconds"], 0.25),
    ]


def burst(bench: Bench) -> list[Row]:
    runs, seconds = (5, 0.5) if bench.small else (100, 8.0)
    numbers = ("--runs", runs, "--seconds", seconds)
    crews, tasks = bench.alternately(("burst", "crews", *numbers), ("burst", "tasks", *numbers))
    work = f"{runs} runs of {seconds:g} s at once in one flow"
    cpu, own_cpu = (1000 * way["server_cpu_seconds"] / runs for way in (crews, tasks))
    walls = f"{number(crews['seconds'])} and {number(tasks['seconds'])} s"
    return [
        Row(work, "wall, times two tasks of Prefect's own", crews["seconds"] / tasks["seconds"], 1.2, walls),
        Row(work, "CPU of the Prefect server, ms a run", cpu, parts=f"Prefect's own {number(own_cpu)} ms"),
    ]


def past(bench: Bench) -> list[Row]:
    records = 500 if bench.small else 150_000
    bench.measure("past", "make", "--records", 1, on="empty")
    bench.measure("past", "make", "--records", records, on="full")
    way = ("past", "work", "--times", 1 if bench.small else 20)
    empty, full = bench.alternately(way, way, on=("empty", "full"))
    goals = {"start": 0.3, "second_call": 0.15, "costs": 1.0}  # of the others 0.05
    rows: list[Row] = []
    for name in (name.removesuffix("_p95") for name in full if name.endswith("_p95")):
        medians = f"{number(full[f'{name}_seconds'])} and {number(empty[f'{name}_seconds'])} s"
        parts = f"no past {number(empty[f'{name}_p95'])} s; medians {medians}"
        figure = f"{name.replace('_', ' ')}, 95 % within, s"
        rows.append(Row(f"{records:,} ended runs", figure, full[f"{name}_p95"], goals.get(name, 0.05), parts))
    return rows


def rows(bench: Bench) -> list[Row]:
    count, in_flight, seconds = (100, 50, 0.2) if bench.small else (5000, 2000, 2.0)
    numbers = ("--rows", count, "--in-flight", in_flight, "--seconds", seconds)
    batch, loop = ("rows", "batch", *numbers), ("rows", "loop", *numbers)
    databases = {"SQLite": "server"} if find_postgres() is None else {"SQLite": "server", "PostgreSQL": "postgres"}
    *batches, bare = bench.alternately(*[batch for _ in databases], loop, on=(*databases.values(), "server"))
    goals = {"SQLite": (1.35, 1.35), "PostgreSQL": (None, 2.3)}
    lines: list[Row] = []
    for name, figures in zip(databases, batches, strict=True):
        work = f"{count:,} rows of {seconds:g} s, {in_flight:,} in flight, {name}"
        wall, cpu = goals[name]
        walls, cpus, memories = (
            f"{number(figures[figure])} and {number(bare[figure])} {unit}"
            for figure, unit in (("seconds", "s"), ("cpu_seconds", "s"), ("memory_mb", "MB"))
        )
        lines += [
            Row(work, "wall, times a bare loop", figures["seconds"] / bare["seconds"], wall, walls),
            Row(work, "CPU, times a bare loop", figures["cpu_seconds"] / bare["cpu_seconds"], cpu, cpus),
            Row(work, "peak memory, MB", figures["memory_mb"], 160, memories),
        ]
    return lines


def worker(bench: Bench) -> list[Row]:
    runs, hold = (5, 2) if bench.small else (300, 20)
    itself, another = (bench.measure("worker", by, "--runs", runs, "--hold", hold) for by in ("itself", "another"))
    work = f"{runs} flow runs that wait in one crew worker"
    of_each = f"{number(itself['run_kb'])} KB a flow run, {number(itself['core_percent'])} % of a core"
    begun = f"{number(itself['run_begun_seconds'])} s to begin each"
    return [
        Row(work, "memory in all, MB", itself["memory_mb"], 120, f"{of_each}, {begun}"),
        Row(work, "killed: waited for again by its next start, s", itself["again_seconds"], 30),
        Row(work, "killed: waited for again by another worker, s", another["again_seconds"], 90),
    ]


def pipeline(bench: Bench) -> list[Row]:
    (figures,) = bench.alternately(("pipeline", "--runs", 1 if bench.small else 5))
    parts = f"{number(figures['seconds'])} s; of Prefect's own tasks {number(figures['floor_step_ms'])} ms"
    work = "a pipeline of 20 steps in 5 layers, 0.2 s crew"
    return [Row(work, "on top of a step of the critical path, ms", figures["step_ms"], 130, parts)]


PARTS = {part.__name__: part for part in (run, burst, past, rows, worker, pipeline)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *PARTS], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny numbers")
    parser.add_argument("--postgres", action="store_true", help="all Prefect servers and crew databases on PostgreSQL")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the servers end with it
    lines = ["| work | figure | measured | goal | made of |", "| --- | --- | --- | --- | --- |"]
    with contextlib.ExitStack() as stack:
        bench = Bench(stack, small=options.small, on_postgres=options.postgres)
        for name in options.parts or PARTS:
            print(f"{name} (load {os.getloadavg()[0]:.1f})", flush=True)
            lines += [row.line() for row in PARTS[name](bench)]
    print(f"\n{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, Prefect {version('prefect')}\n")
    print(*lines, sep="\n")
