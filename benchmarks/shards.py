"""Two shards on two workers beside one process: how much faster the rows go, and what limits it.

    python benchmarks/shards.py                     20,000 rows of an instant crew, one process and two shards in turns
    python benchmarks/shards.py --seconds 2 --in-flight 4000

It starts all that it needs: a PostgreSQL for the ledger, a Prefect server, a process work pool with two workers, and a
crew server that does as little as it can (lean_server.py); it needs the repository's tests and PostgreSQL's programs.
Each batch runs in a process of its own; with shards that one is the parent, which writes the output at the end.

Two times are told. "rows" is from the first kickoff to the last status call: what shards make faster. "all" is the
whole call, with what a worker needs to start a flow run, and with the parent's pass over the ledger at the end, which
no number of shards makes shorter. Beside them the CPU seconds of each part: where they add up to the machine's cores
times "rows", the cores are the limit, and not the design.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from lean_server import TOKEN, lean_server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.batches import postgres_ledger
from support.deployed import ROOT, command
from support.postgres import Postgres, find_postgres
from support.prefect_server import PrefectServer, connected
from support.workers import Worker

POOL = "shards-benchmark"
SHARDS = 2
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process so far, without its children; 0 once it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    return 0.0


def with_children(pid: int) -> list[int]:
    """Return a process and its children. PostgreSQL's backends lose what their environment says of their origin."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


class Meter:
    """Looks at the crew server and at processes while a batch runs: CPU by part, and when rows began and ended."""

    def __init__(self, url: str, parts: dict[str, Callable[[], list[int]]]) -> None:
        self._url = url
        self._parts = parts
        self._over = threading.Event()
        self._first = self._last = 0.0
        self._cpu: dict[str, dict[int, float]] = defaultdict(dict)
        self._base: dict[int, float] = {pid: cpu_of(pid) for pids in parts.values() for pid in pids()}
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = (0, 0)
        with httpx.Client(trust_env=False) as client:
            while not self._over.wait(0.2):
                counts = client.get(f"{self._url}/_counts").json()
                now, told = time.perf_counter(), (counts["kickoffs"], counts["looks"])
                if counts["kickoffs"] and not self._first:
                    self._first = now
                if told != seen:
                    seen, self._last = told, now
                for part, pids in self._parts.items():
                    for pid in pids():
                        self._cpu[part][pid] = max(self._cpu[part].get(pid, 0.0), cpu_of(pid) - self._base.get(pid, 0))

    @property
    def rows_seconds(self) -> float:
        return self._last - self._first

    @property
    def cpu(self) -> dict[str, float]:
        return {part: sum(found.values()) for part, found in self._cpu.items()}


async def measured(given: argparse.Namespace) -> None:
    """Run one batch in this process: it is the only one that works on it, or the parent of shards."""
    from prefect_crew import WaitPolicy, arun_batch

    report = await arun_batch(
        "shards-benchmark", given.dataset, name=given.name, output=given.output, ledger=given.ledger,
        max_in_flight=given.in_flight, shards=given.shards,
        deployment="batch-shard/shards-benchmark" if given.shards > 1 else None,
        wait=WaitPolicy(initial=max(given.seconds, 0.001), factor=1, max_interval=10, jitter=0),
    )  # fmt: skip
    assert report.completed == given.rows, str(report)


class Bench:
    """All that both ways share."""

    def __init__(self, asked: argparse.Namespace, folder: Path, postgres: Postgres, server: PrefectServer) -> None:
        self.asked = asked
        self.folder = folder
        self.server = server
        self.postgres = postgres
        self.workers: list[Worker] = []
        self.dataset = folder / "rows.csv"
        self.dataset.write_text("topic\n" + "".join(f"topic {number}\n" for number in range(asked.rows)))

    def flow_runs(self) -> list[int]:
        return [pid for worker in self.workers for pid in worker.process.family() if pid != worker.process.pid]

    def run(self, shards: int, number: int) -> tuple[float, float]:
        """Run the rows once; print and return the seconds of the rows and of the whole call."""
        asked, name = self.asked, f"bench {shards} {number}"
        with lean_server(asked.seconds) as url:
            from prefect_crew import DeployedCrew

            block: Any = DeployedCrew(url=url, token=TOKEN)  # type: ignore[arg-type]
            block.save("shards-benchmark", overwrite=True)
            given = {
                "rows": asked.rows, "seconds": asked.seconds, "in_flight": asked.in_flight, "shards": shards,
                "name": name, "dataset": str(self.dataset), "output": str(self.folder / f"{shards}-{number}.jsonl"),
                "ledger": postgres_ledger(self.postgres).replace(":unused@", "@"),
            }  # fmt: skip
            parts: dict[str, Callable[[], list[int]]] = {
                "shards": self.flow_runs,
                "PostgreSQL": lambda: with_children(self.postgres.process.pid),
                "Prefect server": lambda: self.server.process.family(),
            }
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, __file__, "--measure", json.dumps(given)],
                env={**os.environ, "PREFECT_LOGGING_LEVEL": "ERROR"},
            )
            with Meter(url, {"one process" if shards == 1 else "parent": lambda: [process.pid], **parts}) as meter:
                code = process.wait()
            seconds = time.perf_counter() - began
            assert code == 0, f"{name} ended with {code}"
            counts = httpx.get(f"{url}/_counts", trust_env=False).json()
        assert counts["keys"] == counts["kickoffs"] == asked.rows, "a row was bought twice"
        cpu = {**{part: used for part, used in meter.cpu.items() if used >= 0.1}, "crew server": counts["cpu"]}
        way = "one process" if shards == 1 else f"{shards} shards"
        print(
            f"  {way:12} rows {meter.rows_seconds:6.1f} s, {asked.rows / meter.rows_seconds:,.0f} a second; "
            f"all {seconds:6.1f} s; load {os.getloadavg()[0]:.1f}; CPU "
            + ", ".join(f"{part} {used:.1f}" for part, used in cpu.items()),
            flush=True,
        )
        return meter.rows_seconds, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a run of the crew takes")
    parser.add_argument("--in-flight", type=int, default=1000, help="of the whole batch: shards share it")
    parser.add_argument("--times", type=int, default=2, help="how often each way is run, in turns")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        asyncio.run(measured(argparse.Namespace(**json.loads(asked.measure))))
        return
    programs = find_postgres()
    if programs is None:
        raise SystemExit("This needs PostgreSQL's programs: initdb and postgres.")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(Postgres(programs))
        server = stack.enter_context(PrefectServer(folder / "prefect"))
        stack.enter_context(connected(server, folder / "home"))
        env = server.env(home=folder / "home")
        command("prefect", "work-pool", "create", POOL, "--type", "process", env=env)
        command(
            *("prefect", "--no-prompt", "deploy", "flows/batch.py:batch_shard", "--name", "shards-benchmark"),
            *("--pool", POOL),
            env=env,
            cwd=ROOT,
        )
        bench = Bench(asked, folder, postgres, server)
        for number in range(SHARDS):
            place = folder / f"worker-{number}"
            place.mkdir()
            worker = Worker(server, POOL, folder=place, name=place.name, limit=1)
            bench.workers.append(stack.enter_context(worker))
        print(
            f"{asked.rows:,} rows of a {asked.seconds:g} s crew, {asked.in_flight:,} in flight, {os.cpu_count()} cores",
            flush=True,
        )
        figures: dict[int, list[tuple[float, float]]] = {1: [], SHARDS: []}
        for number in range(asked.times):
            for shards, runs in figures.items():
                runs.append(bench.run(shards, number))
        one, two = ([median(column) for column in zip(*figures[shards], strict=True)] for shards in (1, SHARDS))
        print(f"  speed-up of {SHARDS} shards: {one[0] / two[0]:.2f} times for the rows, {one[1] / two[1]:.2f} for all")


if __name__ == "__main__":
    main()
