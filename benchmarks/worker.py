"""What flow runs that wait in one crew worker hold, and how soon they are waited for again once it is killed.

    python benchmarks/worker.py --runs 300                  the same worker, started again
    python benchmarks/worker.py --runs 300 --by another     another one, which runs already

On the Prefect server of PREFECT_API_URL. At the end all flow runs complete, with one kickoff each.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from figures import cpu_seconds, memory_mb, report
from lean_server import TOKEN, LeanServer, lean_server

from prefect_crew import DeployedCrew
from support.crew_pool import CrewPool
from support.deployed import wait_until
from support.prefect_server import PrefectServer, connected

HEARTBEAT = 10


def measure(options: argparse.Namespace, pool: CrewPool, crew: LeanServer) -> None:
    block: Any = DeployedCrew(url=crew.url, token=TOKEN, wait={"max_interval": 5.0})  # type: ignore[arg-type]
    with connected(pool.server, pool.folder / "home"):
        block.save(pool.name, overwrite=True, _sync=True)
    first = pool.worker("bench")
    time.sleep(options.hold)
    pid, idle_mb, began = first.process.pid, memory_mb(first.process.pid), time.monotonic()
    deployment = pool.deploy(pool.name)
    topics = ({"topic": str(number)} for number in range(options.runs))
    runs = [pool.start(deployment, crew=pool.name, inputs=inputs) for inputs in topics]

    def looks() -> dict[str, int]:
        return crew.ask("_looks")

    wait_until(lambda: len(looks()) == options.runs and all(looks().values()), "all waited for", seconds=900)
    begun, cpu = time.monotonic() - began, cpu_seconds(pid)
    time.sleep(options.hold)
    busy, held_mb = (cpu_seconds(pid) - cpu) / options.hold, memory_mb(pid)

    second = pool.worker("another") if options.by == "another" else None
    first.process.send(signal.SIGKILL)
    killed = time.monotonic()
    first.kill()
    time.sleep(0.3)  # requests that had left
    before = looks()
    if second is None:
        second, killed = pool.worker("bench"), time.monotonic()

    def all_again() -> bool:
        return all(number > before[run] for run, number in looks().items())

    wait_until(all_again, "all waited for again", seconds=600, pause=0.1)
    again = time.monotonic() - killed
    crew.ask("_end", "POST")
    states = {pool.wait_for(run, seconds=900)["state_name"] for run in runs}
    assert states == {"Completed"}, states
    crew.assert_each_once(options.runs)
    report(
        f"taken over by {options.by}",
        runs=options.runs,
        run_begun_seconds=begun / options.runs,
        memory_mb=held_mb,
        run_kb=1024 * (held_mb - idle_mb) / options.runs,
        core_percent=100 * busy,
        again_seconds=again,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--by", choices=["itself", "another"], default="itself", help="which worker takes over")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds for which the worker is watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = PrefectServer(Path(folder))  # which runs already: to be asked and named alone
        server.port = urlsplit(os.environ["PREFECT_API_URL"]).port or 4200
        with (
            CrewPool(server, Path(folder), f"bench-{os.getpid()}", heartbeat=HEARTBEAT) as pool,
            lean_server(math.inf) as crew,
        ):
            measure(options, pool, crew)


if __name__ == "__main__":
    main()
