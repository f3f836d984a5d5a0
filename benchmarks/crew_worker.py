"""What a crew worker costs, and how fast it is, against a process worker; and two of them against one.

    python benchmarks/crew_worker.py fleet --runs 500        memory, threads and CPU of many flow runs at once
    python benchmarks/crew_worker.py fleet --kind process --runs 20
    python benchmarks/crew_worker.py waiting --runs 2000     the same of flow runs that wait for a file, not for a crew
    python benchmarks/crew_worker.py waves --runs 3000       short flow runs, a hundred at a time
    python benchmarks/crew_worker.py lag --runs 100          crew end to Completed, and schedule to Running
    python benchmarks/crew_worker.py requests                requests to Prefect for one flow run
    python benchmarks/crew_worker.py killed --runs 200       SIGKILL to all waited for again
    python benchmarks/crew_worker.py cancelled --runs 50     so many cancelled at once, until their crews are stopped
    python benchmarks/crew_worker.py idle                    CPU and memory of a worker without work
    python benchmarks/crew_worker.py ranges --rows 10000     two ranges of a batch's rows on two workers, and on one

Each uses the Prefect server of PREFECT_API_URL, or starts one on PostgreSQL with the settings of
deployments/compose.yaml, or on SQLite (`--database sqlite`). The crew is one on the dev server that ends on
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
from prefect_crew.devserver import CrewServer
from support.crew_pool import USER_FLOWS, CrewOnCommand, CrewPool
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


def used(pid: int) -> dict[str, float]:
    """Return what a worker's process holds at this moment."""
    threads, handles = int(process_status(pid)["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"memory_mb": memory_mb(pid), "threads": threads, "handles": handles}


def count(pool: CrewPool, deployment: str, *states: str) -> int:
    """Return how many flow runs of a deployment are in one of these states. The server reads none of them."""
    body = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": list(states)}}}}
    return pool.call("POST", "/flow_runs/count", body)


def fleet(options: argparse.Namespace) -> None:
    with trial(options) as (one, _):
        worker = one.pool.worker("bench")
        time.sleep(5)
        pid = worker.process.pid
        idle_mb, cpu = memory_mb(pid), cpu_seconds(pid)
        began = time.monotonic()
        runs = one.start(options.runs)
        started = time.monotonic() - began
        time.sleep(options.hold)
        family = [child for child in worker.process.family() if child != pid and Path(f"/proc/{child}").exists()]
        held = {**used(pid), "processes": len(family), "processes_mb": sum(map(memory_mb, family))}
        held_cpu = cpu_seconds(pid) + sum(map(cpu_seconds, family)) - cpu
        one.completed(runs)
        report(
            "fleet",
            runs=options.runs,
            kicked_off_seconds=started,
            idle_mb=idle_mb,
            peak_mb=peak_mb(pid),
            **held,
            run_cpu_seconds=max(cpu_seconds(pid) - cpu, held_cpu) / options.runs,
            run_calls=one.crew.requests["status"] / options.runs,
        )


def waiting(options: argparse.Namespace) -> None:
    """Hold many flow runs that wait, and one that watches the event loop which all of them share."""
    with prefect(options) as (server, folder), CrewPool(server, folder, f"waiting-{os.getpid()}") as pool:
        pid = pool.worker("bench").process.pid
        end, seen = folder / "end", folder / "lag"
        pool.start(pool.deploy("watches", f"{USER_FLOWS}.watches_the_loop"), path=str(seen), end=str(end))
        deployment = pool.deploy("waits", f"{USER_FLOWS}.waits_for_a_file")
        time.sleep(10)
        idle_mb, cpu, began = memory_mb(pid), cpu_seconds(pid), time.monotonic()
        for _ in range(options.runs):
            pool.start(deployment, path=str(end))

        def wait_for(state: str) -> float:
            wait_until(lambda: count(pool, deployment, state) == options.runs, seconds=1500, what=state, pause=2.0)
            return time.monotonic() - began

        running, starting = wait_for("RUNNING"), lag_of(seen)
        cpu_started, held_at = cpu_seconds(pid), time.monotonic()
        time.sleep(options.hold)
        core_percent = 100 * (cpu_seconds(pid) - cpu_started) / (time.monotonic() - held_at)
        held, holding, began = used(pid), lag_of(seen), time.monotonic()
        end.touch()
        completed = wait_for("COMPLETED")
        report(
            "waiting",
            runs=options.runs,
            all_running_seconds=running,
            idle_mb=idle_mb,
            **held,
            held_core_percent=core_percent,
            longest_lag_at_start_seconds=starting,
            longest_lag_held_seconds=holding,
            all_completed_seconds=completed,
            run_cpu_seconds=(cpu_seconds(pid) - cpu) / options.runs,
        )


def lag_of(seen: Path) -> float:
    """Return the longest lag of the worker's event loop since the last call."""
    longest = float(seen.read_text())
    seen.unlink()
    return longest


def waves(options: argparse.Namespace) -> None:
    """Run short flow runs, and see whether the worker keeps anything of them."""
    with prefect(options) as (server, folder), CrewPool(server, folder, f"waves-{os.getpid()}") as pool:
        pid = pool.worker("bench").process.pid
        deployment, wave = pool.deploy("short", f"{USER_FLOWS}.greet"), min(100, options.runs)
        cpu, began = cpu_seconds(pid), time.monotonic()
        after: list[dict[str, float]] = []
        for done in range(wave, options.runs + 1, wave):
            for _ in range(wave):
                pool.start(deployment, name="Ada")
            wait_until(
                lambda done=done: count(pool, deployment, "COMPLETED") == done, seconds=600, what="a wave", pause=0.5
            )
            time.sleep(1)
            after.append(used(pid))
        # The first waves fill pools and caches.
        places = {"early": len(after) // 6, "half": len(after) // 2, "last": -1}
        figures = {f"{name}_{place}": after[at][name] for name in after[0] for place, at in places.items()}
        seconds, spent = time.monotonic() - began, cpu_seconds(pid) - cpu
        report("waves", runs=options.runs, seconds=seconds, run_cpu_seconds=spent / options.runs, **figures)


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


def looks(crew: CrewServer) -> dict[str, int]:
    """Return how often each run of a crew was asked for its status."""
    return {run.id: run._status_calls for run in crew.runs}  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def killed(options: argparse.Namespace) -> None:
    for heir in ("bench", "another"):
        with trial(options, wait={"initial": 1.0, "max_interval": 5.0}) as (one, _):
            worker: Worker = one.pool.worker("bench")
            runs = one.start(options.runs)
            wait_until(lambda: all(looks(one.crew).values()), seconds=120, what="all waited for")
            time.sleep(5)
            second = one.pool.worker("another") if heir == "another" else None
            worker.process.send(signal.SIGKILL)
            began = time.monotonic()
            worker.kill()
            time.sleep(0.3)  # requests that had left
            before = looks(one.crew)
            if second is None:
                second = one.pool.worker("bench")
                began = time.monotonic()
            cpu = cpu_seconds(second.process.pid), family_cpu_seconds(one.pool.server.process.pid)

            def waited(one: Trial = one, before: dict[str, int] = before) -> bool:
                return all(number > before[run] for run, number in looks(one.crew).items())

            wait_until(waited, seconds=600, what="all waited for again", pause=0.1)
            report(
                f"killed, taken over by {heir}",
                runs=options.runs,
                seconds=time.monotonic() - began,
                run_worker_cpu_seconds=(cpu_seconds(second.process.pid) - cpu[0]) / options.runs,
                run_server_cpu_seconds=(family_cpu_seconds(one.pool.server.process.pid) - cpu[1]) / options.runs,
                kickoffs=one.crew.kickoffs,
            )
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
        url = options.ledger or stack.enter_context(postgres()).create_database("ledgers")
        # Without the password, which that server does not ask for: a parameter of a flow run must hold none.
        ledgers = url.replace("+asyncpg", "").replace(":unused@", "@")
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


WORK = {work.__name__: work for work in (fleet, waiting, waves, lag, requests, killed, cancelled, idle, ranges)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WORK])
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
    WORK[options.what](options)


if __name__ == "__main__":
    main()
