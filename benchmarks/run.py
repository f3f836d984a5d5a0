"""Measure everything that has a goal, and print a table: figures, goals, and the machine's load.

    python benchmarks/run.py                       all parts; two to three hours on a quiet machine
    python benchmarks/run.py late rows-5k          these parts
    python benchmarks/run.py --small               tiny numbers, to see that everything works
    python benchmarks/run.py --table               write the newest results of each part to benchmarks/README.md

It starts what it needs: a Prefect server on PostgreSQL with the settings of deployments/compose.yaml, one on
SQLite where the table says so. What is compared is measured in turn, each measurement in a process of its own, three
times; medians count. The results are written to benchmarks/results/DATE.json after each part, with each single
measurement under `runs`; a later run of the same day replaces the parts that it measures. Those of `--small` are kept
only with `--to`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from figures import FILE, family_cpu_seconds, number
from parts import PARTS, Figures
from servers import DATABASE, postgres

from support.environment import isolated
from support.postgres import Postgres
from support.prefect_server import QUICK, PrefectServer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE / "README.md"
BEGIN, END = "<!-- figures: benchmarks/run.py --table -->", "<!-- end of figures -->"
LIMIT = 5400.0
"""Seconds for one measurement."""
CALM = 0.2
"""Share of a core below which the servers have done what the measurement before has left to them."""
CALM_WITHIN = 60.0


class Servers:
    """The servers, started when they are first needed; all end with the stack.

    One Prefect server runs at a time, or the two of a pair: "sqlite/empty" and "sqlite/past". "as-it-comes" is one on
    SQLite without the settings that the others have.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._postgres: Postgres | None = None
        self._running: dict[str, PrefectServer] = {}

    @property
    def postgres(self) -> Postgres:
        if self._postgres is None:
            self._postgres = self._stack.enter_context(postgres())
        return self._postgres

    def prefect(self, kind: str) -> PrefectServer:
        database, _, of_a_pair = kind.partition("/")
        for other, server in self._running.items():
            if other != kind and not (of_a_pair and other.startswith(f"{database}/")):
                server.stop()
        if kind not in self._running:
            name = kind.replace("/", "_")
            url = self.postgres.create_database(f"prefect_{name}") if database == "postgres" else None
            self._running[kind] = PrefectServer(self._folder / f"server-{name}", database_url=url)
            self._stack.callback(self._running[kind].stop)
        with patch.dict(QUICK, clear=kind == "as-it-comes"):
            return self._running[kind].start()

    def cpu_seconds(self, kind: str) -> Figures:
        """Return the CPU time of a Prefect server, and of PostgreSQL if it runs."""
        processes = {"server": self._running[kind].process}
        processes |= {"postgres": self._postgres.process} if self._postgres else {}
        return {f"{name}_cpu_seconds": family_cpu_seconds(process.pid) for name, process in processes.items()}

    def calm_down(self) -> None:
        """Wait until the servers rest: they record late what a flow has left behind."""
        deadline = time.monotonic() + CALM_WITHIN
        pids = [server.process.pid for server in self._running.values() if server.running]
        while pids and time.monotonic() < deadline:
            before = sum(map(family_cpu_seconds, pids))
            time.sleep(1)
            if sum(map(family_cpu_seconds, pids)) - before < CALM:
                return


class Runner:
    """The `Bench` of the parts. `runs` are the measurements of the part that goes on."""

    def __init__(self, folder: Path, servers: Servers, *, small: bool) -> None:
        self.folder = folder
        self.small = small
        self.repeat = 1 if small else 3
        self.runs: list[Figures] = []
        self._servers = servers

    def measure(self, script: str, *arguments: Any, on: str = "postgres") -> list[Figures]:
        folder = self.folder / f"run-{time.monotonic_ns()}"
        folder.mkdir()
        env = {FILE: str(folder / "figures.jsonl"), "PREFECT_LOGGING_LEVEL": "ERROR"}
        # As where somebody uses it: what is imported on the way is compiled once, and not in each measurement.
        env["PYTHONDONTWRITEBYTECODE"] = ""
        home, before = folder / "home", Figures()
        if on == "embedded":
            home = self.folder / "embedded-home"  # so that its database is made once
            env["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
        elif on != "none":
            server = self._servers.prefect(on)
            env |= {"PREFECT_API_URL": server.api_url, DATABASE: server.database_url}
        if not self.small:
            self._servers.calm_down()
        if "PREFECT_API_URL" in env:
            before = self._servers.cpu_seconds(on)
        command = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
        try:
            done = subprocess.run(command, env=isolated(home, env), timeout=LIMIT, stderr=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{script} took more than {LIMIT:g} s") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
        if before:
            if not self.small:
                self._servers.calm_down()
            found[-1] |= {name: value - before[name] for name, value in self._servers.cpu_seconds(on).items()}
        given = {"command": " ".join([script, *map(str, arguments)]), "on": on}
        self.runs += [{**given, **figures} for figures in found]
        return found

    def ledger_url(self) -> str:
        url = self._servers.postgres.create_database(f"ledger_{time.monotonic_ns()}")
        # That server asks for no password, and a parameter of a flow run must hold none.
        return url.replace("+asyncpg", "").replace(":unused@", "@")


def measure(names: Sequence[str], kept: Path | None, *, small: bool) -> tuple[Figures, bool]:
    """Measure some parts; return all results of the file, and whether all went well."""
    results = read(kept) if kept and kept.exists() else {"parts": {}}
    results |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "small": small, "machine": machine()}
    went_well = True
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefect-crew-bench-")))
        runner = Runner(folder, Servers(folder, stack), small=small)
        for name in names:
            print(f"{name} ({datetime.now(UTC):%H:%M:%S}, load {os.getloadavg()[0]:.1f})", flush=True)
            began, runner.runs = time.monotonic(), []
            part: Figures = {
                "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                "commit": results["machine"]["commit"],
                "load_before": round(os.getloadavg()[0], 1),
            }
            try:
                part["rows"] = [row.as_dict() for row in PARTS[name](runner)]
            except Exception as error:  # noqa: BLE001  the other parts are measured all the same
                went_well = False
                print(f"  failed: {error}", file=sys.stderr, flush=True)
                if not isinstance(error, RuntimeError):
                    traceback.print_exc()
                part |= {"rows": [], "failed": str(error)[-1000:]}
            part |= {"seconds": round(time.monotonic() - began), "runs": runner.runs}
            results["parts"][name] = part
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(results, indent=1) + "\n")
    return results, went_well


def machine() -> Figures:
    """Return what a figure is worth nothing without."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor[1] if processor else platform.machine(),
        "memory_gb": round(pages / 2**30),
        "python": platform.python_version(),
        "prefect": version("prefect"),
        "commit": commit.strip(),
    }


def table(results: Figures) -> str:
    """Return the results as a table in Markdown."""
    head = ("work", "figure", "measured", "goal", "made of", "load", "when")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in (name for name in PARTS if name in results["parts"]):
        part = results["parts"][name]
        load = f"{part['load_before']}, {max((run['load'] for run in part['runs']), default=0.0)}"
        when = f"{part['at'][:10]}, {part['commit']}"
        if "failed" in part:
            lines.append(f"| {name} | | failed: {part['failed'].strip().splitlines()[-1]} | | | {load} | {when} |")
        for row in part["rows"]:
            goal = "" if row["goal"] is None else f"{'at least ' if row['at_least'] else ''}{row['goal']:g}"
            met = {None: "", True: ", met", False: ", **missed**"}[row["met"]]
            cells = (row["work"], row["figure"], number(float(row["value"])), f"{goal}{met}", row["of"], load, when)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def about(results: Figures) -> str:
    """Return in a few sentences where the results are from."""
    known = results["machine"]
    return (
        f"Measured on {known['cores']} cores ({known['processor']}), {known['memory_gb']} GB, Python {known['python']}"
        f", Prefect {known['prefect']}. `when` is the day and the commit. A value is the median of three measurements "
        "that alternate with those that they are compared with. These were measured once: the 100,000 rows, polling, "
        "the call that writes the output, and the crew worker. `load` is that of the machine before the work, and the "
        "highest while it ran. `benchmarks/results` has each single measurement."
    )


def read(path: Path) -> Figures:
    """Return the results of a file; each part has the commit that it was measured at."""
    results = json.loads(path.read_text())
    for part in results["parts"].values():
        part.setdefault("commit", results["machine"]["commit"])
    return results


def newest() -> Figures:
    """Return the newest results of each part, and the machine of the newest."""
    found = [read(path) for path in sorted(RESULTS.glob("*.json"))]
    if not found:
        sys.exit(f"There are no results in {RESULTS} yet: run benchmarks/run.py first.")
    parts = {name: part for results in found for name, part in results["parts"].items()}
    return {**found[-1], "parts": parts}


def fill_page(results: Figures) -> None:
    """Write the table to benchmarks/README.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{about(results)}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="tiny numbers")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where the results are kept")
    parser.add_argument("--table", action="store_true", help="write the table of the newest results, measure nothing")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if given.table:
        results = read(given.to) if given.to else newest()
        fill_page(results)
        print(table(results))
        return
    # So that the servers end with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    kept = given.to or (None if given.small else RESULTS / f"{datetime.now(UTC):%Y-%m-%d}.json")
    began = time.monotonic()
    results, went_well = measure(given.names or list(PARTS), kept, small=given.small)
    print(f"\n{about(results)}\n\n{table(results)}\n\n{time.monotonic() - began:.0f} s; {kept or 'not kept'}")
    sys.exit(not went_well)


if __name__ == "__main__":
    main()
