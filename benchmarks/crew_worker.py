"""What a crew worker costs, and how fast it is, against a process worker.

    python benchmarks/crew_worker.py fleet --runs 500        memory, threads and CPU of many flow runs at once
    python benchmarks/crew_worker.py fleet --kind process --runs 20
    python benchmarks/crew_worker.py lag --runs 100          crew end to Completed, and schedule to kickoff
    python benchmarks/crew_worker.py requests                requests to Prefect for one flow run
    python benchmarks/crew_worker.py killed --runs 200       SIGKILL to all waited for again
    python benchmarks/crew_worker.py idle                    CPU and memory of a worker without work

Each starts a Prefect server on PostgreSQL with the settings of docs/deployments.md (or SQLite: `--database sqlite`),
and a crew on the dev server that ends on command. It needs the repository's tests, PostgreSQL, and Linux's /proc.
Goals, two cores: 500 flow runs in 250 MB with few threads, 0.15 CPU s and 22 requests a run; idle 1 % of a core; killed
with 200 in flight: all waited for again 30 s after the restart of the same worker, 90 s by another one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from waiting import HOOKS, receiver

from support.crew_pool import CrewOnCommand, CrewPool
from support.deployed import wait_until
from support.postgres import Postgres, find_postgres
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.workers import Worker

TICK = os.sysconf("SC_CLK_TCK")
MIB = 1024.0


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


def kib(text: str) -> int:
    return int(text.split()[0])


class Trial:
    """A server, a pool and one crew that ends on command."""

    def __init__(self, pool: CrewPool, wait: dict[str, Any]) -> None:
        self.pool = pool
        self.program = CrewOnCommand()
        self.crew = pool.add_crew("bench", self.program, wait=wait)
        self.deployment = pool.deploy("bench")

    def start(self, count: int) -> list[str]:
        before = self.crew.kickoffs
        runs = [self.pool.start(self.deployment, crew="bench", inputs={"topic": str(n)}) for n in range(count)]
        wait_until(lambda: self.crew.kickoffs >= before + count, seconds=900, what="all kicked off", pause=0.5)
        return runs

    def completed(self, runs: list[str]) -> list[dict[str, Any]]:
        """End the crew's runs, and return the flow runs once all have completed."""
        self.program.ended = True
        found = [self.pool.wait_for(run_id, seconds=900) for run_id in runs]
        states = {run["state_name"] for run in found}
        assert states == {"Completed"}, states
        assert self.crew.kickoffs == len(runs)
        return found


@contextlib.contextmanager
def trial(options: argparse.Namespace, *, proxied: bool = False, wait: dict[str, Any] | None = None) -> Iterator[Any]:
    """Yield a trial, and the proxy before Prefect where its requests are to be counted."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = None
        if options.database == "postgres":
            programs = find_postgres()
            if programs is None:
                sys.exit("needs PostgreSQL (Debian: apt-get install postgresql), or --database sqlite")
            url = stack.enter_context(Postgres(programs)).create_database("bench")
        server = stack.enter_context(PrefectServer(folder / "server", database_url=url))
        proxy = stack.enter_context(Proxy(server.port)) if proxied else None
        pool = stack.enter_context(CrewPool(server, folder, heartbeat=options.heartbeat, kind=options.kind))
        yield Trial(pool, wait or {}), proxy


def fleet(options: argparse.Namespace) -> None:
    with trial(options) as (one, _):
        worker = one.pool.worker("bench")
        time.sleep(5)
        pid = worker.process.pid
        base, cpu = kib(status(pid)["VmRSS"]), cpu_seconds(pid)
        began = time.monotonic()
        runs = one.start(options.runs)
        started = time.monotonic() - began
        time.sleep(options.hold)
        family = [one for one in worker.process.family() if one != pid]
        held = [status(child) for child in family if Path(f"/proc/{child}").exists()]
        now = status(pid)
        print(f"{options.runs} flow runs at once, all kicked off after {started:.0f} s, held {options.hold} s:")
        print(f"  worker {kib(now['VmRSS']) / MIB:.0f} MB (idle {base / MIB:.0f}), {now['Threads'].strip()} threads")
        if held:
            print(f"  {len(held)} processes, {sum(kib(child['VmRSS']) for child in held) / MIB:.0f} MB together")
        children = sum(cpu_seconds(child) for child in family if Path(f"/proc/{child}").exists())
        held_cpu = cpu_seconds(pid) + children - cpu
        one.completed(runs)
        used = max(cpu_seconds(pid) - cpu, held_cpu)
        print(f"  peak {kib(status(pid)['VmHWM']) / MIB:.0f} MB, {used / options.runs:.3f} CPU s a run, polls included")
        print(f"  {one.crew.requests['status'] / options.runs:.1f} status requests a run")


def lag(options: argparse.Namespace) -> None:
    with trial(options, wait={}) as (one, _), contextlib.ExitStack() as stack:
        os.environ["PREFECT_API_URL"] = one.pool.server.api_url
        stack.enter_context(receiver(options.webhooks))
        hooks = {name: os.environ[name] for name in HOOKS if options.webhooks}
        one.pool.worker("bench", **hooks)
        runs = one.start(options.runs)
        time.sleep(options.hold)
        one.program.ended = True
        ended = time.time()
        found = one.completed(runs)
        waits = sorted(parsed(run["end_time"]) - ended for run in found)
        starts = sorted(parsed(run["start_time"]) - parsed(run["expected_start_time"]) for run in found)
        way = "webhooks on" if options.webhooks else "polling"
        print(f"crew end to Completed, {options.runs} at once, {way}: {percentiles(waits)}")
        print(f"schedule to Running, {options.runs} at once: {percentiles(starts)}")


def requests(options: argparse.Namespace) -> None:
    with trial(options, proxied=True) as (one, proxy):
        worker = one.pool.worker("bench", PREFECT_API_URL=f"{proxy.url}/api")
        wait_until(lambda: "started!" in worker.log.read_text(), seconds=60, what="the worker")
        time.sleep(5)
        before = len(proxy.requests)
        time.sleep(10)
        idle = (len(proxy.requests) - before) / 10
        before, began = len(proxy.requests), time.monotonic()
        runs = one.start(options.runs)
        one.completed(runs)
        seconds = time.monotonic() - began
        made = proxy.requests[before:]
        ours = len(made) - idle * seconds
        print(f"{ours / options.runs:.1f} requests to Prefect a flow run; the idle worker makes {idle:.2f} a second")
        shapes: dict[str, int] = {}
        for line in made:
            method, path = line.split(" ", 1)
            shape = (
                method + " " + "/".join("*" if len(part) > 30 or part.isdigit() else part for part in path.split("/"))
            )
            shapes[shape] = shapes.get(shape, 0) + 1
        for shape, count in sorted(shapes.items(), key=lambda item: -item[1]):
            print(f"  {count / options.runs:5.1f} {shape}")


def killed(options: argparse.Namespace) -> None:
    for heir in ("bench", "another"):
        with trial(options, wait={"initial": 1.0, "max_interval": 5.0}) as (one, _):
            worker: Worker = one.pool.worker("bench")
            runs = one.start(options.runs)
            time.sleep(5)
            second = one.pool.worker("another") if heir == "another" else None
            worker.process.send(signal.SIGKILL)
            began = time.monotonic()
            worker.kill()
            if second is None:
                one.pool.worker("bench")
                began = time.monotonic()

            def waited(one: Trial = one, runs: list[str] = runs) -> bool:
                body = {"flow_runs": {"id": {"any_": runs}}, "limit": 200}
                page = one.pool.call("POST", "/flow_runs/filter", body)
                return all(run["state_name"] == "Running" and run["run_count"] >= 2 for run in page)

            wait_until(waited, seconds=600, what="all run again", pause=0.5)
            seconds = time.monotonic() - began
            print(
                f"killed with {options.runs} in flight, adopted by {heir}: all run again after {seconds:.1f} s; "
                f"{one.crew.kickoffs} kickoffs",
                flush=True,
            )
            one.completed(runs)


def idle(options: argparse.Namespace) -> None:
    with trial(options) as (one, _):
        worker = one.pool.worker("bench")
        time.sleep(10)
        pid = worker.process.pid
        cpu, began = cpu_seconds(pid), time.monotonic()
        time.sleep(60)
        share = (cpu_seconds(pid) - cpu) / (time.monotonic() - began)
        now = status(pid)
        print(f"idle: {share:.2%} of a core, {kib(now['VmRSS']) / MIB:.0f} MB, {now['Threads'].strip()} threads")


def parsed(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def percentiles(values: list[float]) -> str:
    cuts = quantiles(values, n=20)
    return f"p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s, most {values[-1]:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fleet", "lag", "requests", "killed", "idle"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which all wait")
    parser.add_argument("--kind", choices=["crew", "process"], default="crew")
    parser.add_argument("--webhooks", action="store_true", help="lag: with a receiver, in a process of its own")
    parser.add_argument("--database", choices=["postgres", "sqlite"], default="postgres")
    parser.add_argument("--heartbeat", type=int, default=10)
    options = parser.parse_args()
    globals()[options.what](options)


if __name__ == "__main__":
    main()
