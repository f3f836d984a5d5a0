"""What a crew worker costs, and how fast it is, against a process worker; and two of them against one.

    python benchmarks/crew_worker.py fleet --runs 500        memory, threads and CPU of many flow runs at once
    python benchmarks/crew_worker.py fleet --kind process --runs 20
    python benchmarks/crew_worker.py lag --runs 100          crew end to Completed, and schedule to Running
    python benchmarks/crew_worker.py requests                requests to Prefect for one flow run
    python benchmarks/crew_worker.py killed --runs 200       SIGKILL to all waited for again
    python benchmarks/crew_worker.py cancelled --runs 50     so many cancelled at once, until their crews are stopped
    python benchmarks/crew_worker.py idle                    CPU and memory of a worker without work
    python benchmarks/crew_worker.py ranges --rows 10000     two ranges of a batch's rows on two workers, and on one

Each uses the Prefect server of PREFECT_API_URL, or starts one on PostgreSQL with the settings of
deployments/starter/compose.yaml, or on SQLite (`--database sqlite`). The crew is one on the dev server that ends on
command; that of `ranges` is done at once, and the ledger is in PostgreSQL. It needs the repository's tests, PostgreSQL,
and Linux's /proc. Goals, two cores: 500 flow runs in 250 MB with few threads, 0.15 CPU s and 22 requests a run; idle
1 % of a core; killed with 200 in flight: all waited for again 30 s after the restart of the same worker, 90 s by
another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batch import write_rows
from figures import cpu_seconds, family_cpu_seconds, lags, memory_mb, peak_mb, process_status, report
from lean_server import TOKEN, lean_server
from past import PostgresDatabase, Sqlite, make_past
from servers import postgres, prefect_server_of, receiver

from prefect_crew import DeployedCrew
from support.crew_pool import CrewOnCommand, CrewPool
from support.deployed import wait_until
from support.prefect_server import PrefectServer, connected
from support.proxy import Proxy
from support.workers import Worker


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
def prefect(options: argparse.Namespace) -> Iterator[tuple[PrefectServer, Path]]:
    """Yield the Prefect server, and a folder."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if os.environ.get("PREFECT_API_URL"):
            yield prefect_server_of(), folder
            return
        url = None
        if options.database == "postgres":
            url = stack.enter_context(postgres()).create_database("bench")
        yield stack.enter_context(PrefectServer(folder / "server", database_url=url)), folder


@contextlib.contextmanager
def trial(options: argparse.Namespace, *, proxied: bool = False, wait: dict[str, Any] | None = None) -> Iterator[Any]:
    """Yield a trial, and the proxy before Prefect where its requests are to be counted."""
    with prefect(options) as (server, folder), contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.port)) if proxied else None
        pool = CrewPool(server, folder, f"bench-{os.getpid()}", heartbeat=options.heartbeat, kind=options.kind)
        yield Trial(stack.enter_context(pool), wait or {}), proxy


def fleet(options: argparse.Namespace) -> None:
    with trial(options) as (one, _):
        worker = one.pool.worker("bench")
        time.sleep(5)
        pid = worker.process.pid
        base, cpu = memory_mb(pid), cpu_seconds(pid)
        began = time.monotonic()
        runs = one.start(options.runs)
        started = time.monotonic() - began
        time.sleep(options.hold)
        family = [one for one in worker.process.family() if one != pid]
        held = [memory_mb(child) for child in family if Path(f"/proc/{child}").exists()]
        threads = int(process_status(pid)["Threads"])
        children = sum(cpu_seconds(child) for child in family if Path(f"/proc/{child}").exists())
        held_cpu = cpu_seconds(pid) + children - cpu
        one.completed(runs)
        report(
            "fleet",
            runs=options.runs,
            kicked_off_seconds=started,
            idle_mb=base,
            peak_mb=peak_mb(pid),
            threads=threads,
            processes=len(held),
            processes_mb=sum(held),
            run_cpu_seconds=max(cpu_seconds(pid) - cpu, held_cpu) / options.runs,
            run_calls=one.crew.requests["status"] / options.runs,
        )


def lag(options: argparse.Namespace) -> None:
    with trial(options, wait={}) as (one, _), contextlib.ExitStack() as stack:
        os.environ["PREFECT_API_URL"] = one.pool.server.api_url
        if options.webhooks:
            stack.enter_context(receiver())
        hooks = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_INTEGRATIONS_CREW_")}
        one.pool.worker("bench", **hooks)
        runs = one.start(options.runs)
        time.sleep(options.hold)
        one.program.ended = True
        ended = time.time()
        found = one.completed(runs)
        waits = [parsed(run["end_time"]) - ended for run in found]
        starts = [parsed(run["start_time"]) - parsed(run["expected_start_time"]) for run in found]
        way = "webhooks" if options.webhooks else "polling"
        report(f"crew end to Completed, {way}", runs=options.runs, **lags(waits))
        report("schedule to Running", runs=options.runs, **lags(starts))


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
        shapes: dict[str, float] = {}
        for line in made:
            method, path = line.split(" ", 1)
            parts = ("*" if len(part) > 30 or part.isdigit() else part for part in path.split("/"))
            shape = f"{method} {'/'.join(parts)}"
            shapes[shape] = shapes.get(shape, 0) + 1 / options.runs
        run_requests = (len(made) - idle * seconds) / options.runs
        report("requests", run_requests=run_requests, idle_requests_a_second=idle, shapes=shapes)


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
            report(f"killed, adopted by {heir}", runs=options.runs, seconds=seconds, kickoffs=one.crew.kickoffs)
            one.completed(runs)


def cancelled(options: argparse.Namespace) -> None:
    """Cancel all flow runs at once, with `--past` on a server that has so many ended records."""
    with trial(options) as (one, _):
        pool: CrewPool = one.pool
        if options.past:
            path = pool.server.database
            database = PostgresDatabase(pool.server.database_url) if path is None else Sqlite(path)
            with lean_server(0.0) as crew, connected(pool.server, pool.server.home):
                block: Any = DeployedCrew(url=crew.url, token=TOKEN)  # type: ignore[arg-type]
                asyncio.run(make_past(database, block, options.past))
        pool.worker("bench")
        runs = one.start(options.runs)
        began = time.monotonic()
        for run_id in runs:
            pool.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        asked = time.monotonic() - began

        def states() -> list[str]:
            page = pool.call("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": runs}}, "limit": 200})
            return [run["state_name"] for run in page]

        wait_until(lambda: set(states()) == {"Cancelled"}, seconds=600, what="all cancelled", pause=0.5)
        seconds = time.monotonic() - began
        stops = one.crew.requests["stop"]
        report("cancelled", runs=options.runs, past=options.past, asked_seconds=asked, seconds=seconds, stops=stops)


def idle(options: argparse.Namespace) -> None:
    with trial(options) as (one, _):
        worker = one.pool.worker("bench")
        time.sleep(10)
        pid = worker.process.pid
        cpu, began = cpu_seconds(pid), time.monotonic()
        time.sleep(60)
        share = (cpu_seconds(pid) - cpu) / (time.monotonic() - began)
        threads = int(process_status(pid)["Threads"])
        report("idle worker", core_percent=100 * share, memory_mb=memory_mb(pid), threads=threads)


def ranges(options: argparse.Namespace) -> None:
    """Run the same two ranges on one worker and on two, alternating."""
    with prefect(options) as (server, folder), contextlib.ExitStack() as stack:
        ledgers = options.ledger
        if ledgers is None:
            ledgers = stack.enter_context(postgres()).create_database("ledgers").replace("+asyncpg", "")
        write_rows(folder / "rows.csv", options.rows)
        for turn in range(options.times):
            for workers in (1, 2):
                _two_ranges(options, server, folder / f"{turn}-{workers}", workers, ledgers)


def _two_ranges(options: argparse.Namespace, server: PrefectServer, folder: Path, workers: int, ledger: str) -> None:
    folder.mkdir()
    pool_name = f"ranges-{os.getpid()}-{folder.name}"
    with CrewPool(server, folder, pool_name) as pool, lean_server(0.0) as crew:
        with connected(server, folder / "home"):
            block: Any = DeployedCrew(url=crew.url, token=TOKEN)  # type: ignore[arg-type]
            block.save(pool_name, overwrite=True, _sync=True)
        deployment = pool.deploy("ranges", "prefect_crew.operations.batch_file")
        started = [pool.worker(f"worker-{number}", limit=2 // workers) for number in range(workers)]
        others = {name: int(pid) for name, pid in (pair.split("=") for pair in options.pids)}
        pids = {**others, **{f"worker_{number}": one.process.pid for number, one in enumerate(started, 1)}}
        before = {name: family_cpu_seconds(pid) for name, pid in pids.items()}
        half, at = options.rows // 2, datetime.now(UTC) + timedelta(seconds=options.soon)
        given: dict[str, Any] = {"crew": pool_name, "dataset": str(folder.parent / "rows.csv"), "ledger": ledger}
        runs: list[str] = []
        for number, rows in enumerate((f"0:{half}", f"{half}:"), 1):
            more = {"rows": rows, "max_in_flight": 500, "wait": {"initial": 0.05, "factor": 1, "jitter": 0}}
            given |= {"name": f"{pool_name}/{number}", "export": str(folder / f"{number}.jsonl"), "options": more}
            runs.append(pool.start(deployment, at=at, **given))
        found = [pool.wait_for(run, seconds=900) for run in runs]
        assert {run["state_type"] for run in found} == {"COMPLETED"}, [run["state"] for run in found]
        cpu = {f"{name}_cpu_seconds": family_cpu_seconds(pid) - before[name] for name, pid in pids.items()}
        counts = crew.counts()
        assert counts["kickoffs"] == counts["keys"] == options.rows
        begun = min(parsed(run["start_time"]) for run in found)
        report(
            f"ranges on {workers}",
            rows=options.rows,
            seconds=max(parsed(run["end_time"]) for run in found) - begun,
            begun_apart_seconds=max(parsed(run["start_time"]) for run in found) - begun,
            **cpu,
            crew_cpu_seconds=counts["cpu_seconds"],
        )


def parsed(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fleet", "lag", "requests", "killed", "cancelled", "idle", "ranges"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which all wait")
    parser.add_argument("--kind", choices=["crew", "process"], default="crew")
    parser.add_argument("--webhooks", action="store_true", help="lag: with a receiver, in a process of its own")
    parser.add_argument("--database", choices=["postgres", "sqlite"], default="postgres")
    parser.add_argument("--past", type=int, default=0, help="for `cancelled`: ended records on the server")
    parser.add_argument("--rows", type=int, default=10_000, help="for `ranges`")
    parser.add_argument("--times", type=int, default=1, help="for `ranges`")
    # The workers have their flow runs by then, and start them at that time.
    parser.add_argument("--soon", type=float, default=10.0, help="seconds until the ranges begin")
    parser.add_argument("--ledger", help="the URL of a PostgreSQL database, for `ranges`")
    parser.add_argument("--pids", nargs="*", default=[], help="NAME=PID of further processes whose CPU is told")
    parser.add_argument("--heartbeat", type=int, default=10)
    options = parser.parse_args()
    globals()[options.what](options)


if __name__ == "__main__":
    main()
