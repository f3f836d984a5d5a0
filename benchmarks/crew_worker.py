"""What flow runs on a crew worker hold, and how soon they are back; and two workers against one.

    python benchmarks/crew_worker.py killed --runs 200               SIGKILL to all waited for again, by the same worker
    python benchmarks/crew_worker.py killed --by another             the same by another worker
    python benchmarks/crew_worker.py cancelled --runs 50             so many cancelled at once, until all are Cancelled
    python benchmarks/crew_worker.py waiting --held 2000 5000        flow runs that wait for a file, not for a crew
    python benchmarks/crew_worker.py waiting --held 10 --kind process         the same on Prefect's process worker
    python benchmarks/crew_worker.py short --runs 3000               short flow runs, one after the other
    python benchmarks/crew_worker.py ranges --rows 10000 --workers 2 --ledger URL    two ranges of a batch's rows

On the Prefect server of PREFECT_API_URL. It needs the repository's tests, and Linux's /proc. `waiting` begins flow runs
at the pace of the Prefect server: it makes the next ones once nearly all before them run.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from batch import write_rows
from figures import cpu_seconds, family_cpu_seconds, memory_mb, process_status, report
from lean_server import TOKEN, LeanServer, lean_server
from servers import prefect_server_of

from prefect_crew import DeployedCrew
from support.crew_pool import IMPORTABLE, USER_FLOWS, CrewPool
from support.deployed import wait_until
from support.prefect_server import connected
from support.workers import Worker

HEARTBEAT = 10
BEGINNING = 20
"""The most flow runs that wait for their worker or for their Running state."""


@contextlib.contextmanager
def crew_pool(kind: str = "crew") -> Iterator[CrewPool]:
    """Yield a pool whose name no other measurement has; a deployment of that name has flow runs of this one alone."""
    server, name = prefect_server_of(), f"bench-{os.getpid()}"
    with (
        tempfile.TemporaryDirectory() as folder,
        CrewPool(server, Path(folder), name, heartbeat=HEARTBEAT, kind=kind) as pool,
    ):
        yield pool


@contextlib.contextmanager
def crew_behind(pool: CrewPool, seconds: float, **wait: Any) -> Iterator[LeanServer]:
    """Yield the server of a crew, whose block has the pool's name."""
    with lean_server(seconds) as crew, connected(pool.server, pool.folder / "home"):
        block: Any = DeployedCrew(url=crew.url, token=TOKEN, wait=wait)  # type: ignore[arg-type]
        block.save(pool.name, overwrite=True, _sync=True)
        yield crew


class Trial:
    """A pool, and a crew whose runs end on command."""

    def __init__(self, pool: CrewPool, crew: LeanServer) -> None:
        self.pool = pool
        self.crew = crew
        self.deployment = pool.deploy(pool.name)
        self.runs: list[str] = []

    def start(self, number: int) -> None:
        """Start flow runs, and return once all crews are kicked off."""
        given = ({"crew": self.pool.name, "inputs": {"topic": str(topic)}} for topic in range(number))
        self.runs = [self.pool.start(self.deployment, **parameters) for parameters in given]
        wait_until(lambda: self.crew.counts()["kickoffs"] >= number, "all kicked off", seconds=900, pause=0.5)

    def complete(self) -> None:
        """End the crew's runs, and return once all flow runs have completed."""
        self.crew.ask("_end", "POST")
        found = [self.pool.wait_for(run_id, seconds=900) for run_id in self.runs]
        assert {run["state_name"] for run in found} == {"Completed"}, [run["state"] for run in found]
        self.each_once()

    def each_once(self) -> None:
        counts = self.crew.counts()
        assert counts["kickoffs"] == counts["keys"] == len(self.runs), counts

    def looks(self) -> dict[str, int]:
        """Return how often each run of the crew was asked for its status."""
        return self.crew.ask("_looks")


@contextlib.contextmanager
def trial() -> Iterator[Trial]:
    with crew_pool() as pool, crew_behind(pool, math.inf, initial=1.0, max_interval=5.0) as crew:
        yield Trial(pool, crew)


def killed(given: argparse.Namespace) -> None:
    with trial() as one:
        worker = one.pool.worker("bench")
        one.start(given.runs)
        wait_until(lambda: all(one.looks().values()), "all waited for", seconds=120)
        time.sleep(5)
        second = one.pool.worker("another") if given.by == "another" else None
        worker.process.send(signal.SIGKILL)
        began = time.monotonic()
        worker.kill()
        time.sleep(0.3)  # requests that had left
        before = one.looks()
        if second is None:
            second = one.pool.worker("bench")
            began = time.monotonic()
        cpu = cpu_seconds(second.process.pid)

        def waited() -> bool:
            return all(number > before[run] for run, number in one.looks().items())

        wait_until(waited, "all waited for again", seconds=600, pause=0.1)
        spent = cpu_seconds(second.process.pid) - cpu
        seconds = time.monotonic() - began
        one.complete()
        cpu_ms = 1000 * spent / given.runs
        report(f"killed, taken over by {given.by}", runs=given.runs, seconds=seconds, run_cpu_ms=cpu_ms)


def cancelled(given: argparse.Namespace) -> None:
    with trial() as one:
        one.pool.worker("bench")
        one.start(given.runs)
        began = time.monotonic()
        for run_id in one.runs:
            one.pool.set_state(run_id, "CANCELLING")
        wait_for(one.pool, one.deployment, "CANCELLED", given.runs)
        seconds = time.monotonic() - began
        one.each_once()
        report("cancelled", runs=given.runs, seconds=seconds, stops=one.crew.counts()["stops"])


def used(worker: Worker) -> dict[str, float]:
    """Return what a worker and its processes hold at this moment."""
    pids = worker.process.family()
    return {
        "memory_mb": sum(map(memory_mb, pids)),
        "threads": sum(int(process_status(pid)["Threads"]) for pid in pids),
        "handles": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
    }


def count(pool: CrewPool, deployment: str, state: str) -> int:
    """Return how many flow runs of a deployment are in this state. The server reads none of them."""
    body = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": [state]}}}}
    return pool.call("POST", "/flow_runs/count", body)


def wait_for(pool: CrewPool, deployment: str, state: str, number: int) -> None:
    what = f"{number} flow runs {state}"
    wait_until(lambda: count(pool, deployment, state) >= number, what, seconds=1200, pause=0.5)


def waiting(given: argparse.Namespace) -> None:
    """Hold many flow runs that wait, and one that watches the event loop which all of them share."""
    with crew_pool(given.kind) as pool:
        worker = pool.worker("bench")
        pid, end, seen = worker.process.pid, pool.folder / "end", pool.folder / "lag"
        pool.start(pool.deploy(pool.name, f"{USER_FLOWS}.watches_the_loop"), path=str(seen), end=str(end))
        deployment, begun = pool.deploy(pool.name, f"{USER_FLOWS}.waits_for_a_file"), 0

        def longest_lag() -> float:
            """Return the longest lag of the worker's event loop since the last call."""
            longest = float(seen.read_text())
            seen.unlink()
            return longest

        wait_until(seen.exists, "the watch of the event loop", seconds=120)
        time.sleep(10)
        idle_mb = used(worker)["memory_mb"]
        for held in given.held:
            more, cpu, began = held - begun, family_cpu_seconds(pid), time.monotonic()
            while begun < held:
                begun += 1
                pool.start(deployment, path=str(end))
                if begun % 10 == 0:
                    wait_for(pool, deployment, "RUNNING", begun - BEGINNING)
            wait_for(pool, deployment, "RUNNING", held)
            spent, seconds, starting = family_cpu_seconds(pid) - cpu, time.monotonic() - began, longest_lag()
            time.sleep(given.hold)
            holds = used(worker)
            report(
                "waiting",
                runs=held,
                run_begun_seconds=seconds / more,
                run_begun_cpu_ms=1000 * spent / more,
                run_kb=1024 * (holds["memory_mb"] - idle_mb) / held,
                **holds,
                core_percent=100 * (family_cpu_seconds(pid) - cpu - spent) / given.hold,
                longest_lag_at_start_seconds=starting,
                longest_lag_seconds=longest_lag(),
            )
        began = time.monotonic()
        end.touch()
        with contextlib.suppress(AssertionError):  # how many of them is reported
            wait_for(pool, deployment, "COMPLETED", begun)
        seconds = time.monotonic() - began
        report("completed", runs=begun, seconds=seconds, completed=count(pool, deployment, "COMPLETED"))


def short(given: argparse.Namespace) -> None:
    """Run short flow runs, and see whether the worker keeps anything of them."""
    env = {"PREFECT_INTEGRATIONS_CREW_WORKER_MODULES": USER_FLOWS, "PYTHONPATH": str(IMPORTABLE)}
    with (
        crew_pool() as pool,
        Worker(pool.server, pool.name, kind="crew", folder=pool.folder, poll=0.1, env=env) as worker,
    ):
        deployment = pool.deploy(pool.name, f"{USER_FLOWS}.sleeps")
        began, after = time.monotonic(), dict[str, float]()
        for number in range(1, given.runs + 1):
            run_id = pool.start(deployment, seconds=0.0)
            while pool.flow_run(run_id)["state_type"] != "COMPLETED":
                time.sleep(0.1)
            # The first half fills pools and caches.
            if number in (given.runs // 2, given.runs):
                place = "last" if number == given.runs else "half"
                after |= {f"{name}_{place}": value for name, value in used(worker).items()}
        report("short", runs=given.runs, run_seconds=(time.monotonic() - began) / given.runs, **after)


def ranges(given: argparse.Namespace) -> None:
    """Run the same two ranges on one worker or on two."""
    with crew_pool() as pool, crew_behind(pool, 0.0) as crew:
        write_rows(pool.folder / "rows.csv", given.rows)
        deployment = pool.deploy(pool.name, "prefect_crew.operations.batch_file")
        workers = [pool.worker(f"worker-{number}", limit=2 // given.workers) for number in range(given.workers)]
        cpu = {worker: family_cpu_seconds(worker.process.pid) for worker in workers}
        # The workers have their flow runs by then, and start them at that time.
        half, at = given.rows // 2, datetime.now(UTC) + timedelta(seconds=given.soon)
        both: dict[str, Any] = {"crew": pool.name, "dataset": str(pool.folder / "rows.csv"), "ledger": given.ledger}
        runs: list[str] = []
        for number, rows in enumerate((f"0:{half}", f"{half}:"), 1):
            more = {"rows": rows, "max_in_flight": 500, "wait": {"initial": 0.05, "factor": 1, "jitter": 0}}
            own = {"name": f"{pool.name}/{number}", "export": str(pool.folder / f"{number}.jsonl"), "options": more}
            runs.append(pool.start(deployment, at=at, **both, **own))
        wait_for(pool, deployment, "COMPLETED", len(runs))
        found = [pool.flow_run(run) for run in runs]
        counts, begun = crew.counts(), min(moment(run, "start_time") for run in found)
        assert counts["kickoffs"] == counts["keys"] == given.rows
        report(
            f"ranges on {given.workers}",
            rows=given.rows,
            seconds=max(moment(run, "end_time") for run in found) - begun,
            begun_apart_seconds=max(moment(run, "start_time") for run in found) - begun,
            workers_cpu_seconds=sum(family_cpu_seconds(worker.process.pid) - cpu[worker] for worker in workers),
            crew_cpu_seconds=counts["cpu_seconds"],
        )


def moment(run: Mapping[str, Any], name: str) -> float:
    return datetime.fromisoformat(run[name]).timestamp()


WORK = {work.__name__: work for work in (killed, cancelled, waiting, short, ranges)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WORK])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--by", choices=["bench", "another"], default="bench", help="killed: who takes over")
    parser.add_argument("--held", type=int, nargs="+", default=[2000, 5000], help="waiting: measured at each number")
    parser.add_argument("--hold", type=float, default=60.0, help="waiting: seconds for which all wait")
    parser.add_argument("--kind", choices=["crew", "process"], default="crew", help="waiting: the type of the worker")
    parser.add_argument("--rows", type=int, default=10_000, help="ranges")
    parser.add_argument("--workers", type=int, choices=[1, 2], default=2, help="ranges")
    parser.add_argument("--soon", type=float, default=10.0, help="ranges: seconds until they begin")
    parser.add_argument("--ledger", help="ranges: the URL of a PostgreSQL database, without a password")
    given = parser.parse_args()
    WORK[given.what](given)


if __name__ == "__main__":
    main()
