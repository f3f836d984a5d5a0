"""What flow runs that wait in one crew worker hold, and how soon they are waited for again once it is killed.

    python benchmarks/worker.py itself --runs 300      the same worker, started again
    python benchmarks/worker.py another --runs 300     another one, which runs already

On the Prefect server of PREFECT_API_URL. At the end all flow runs complete, with one kickoff each.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from figures import cpu_seconds, memory_mb, options_of, report
from lean_server import LeanServer, lean_server

from support.crew_pool import CrewPool
from support.deployed import wait_until
from support.prefect_server import PrefectServer, connected


def measure(pool: CrewPool, crew: LeanServer, by: str, count: int, hold: float) -> None:
    with connected(pool.server, pool.folder / "home"):
        crew.crew(wait={"max_interval": 5.0}).save(pool.name, overwrite=True, _sync=True)
    first = pool.worker("bench")
    time.sleep(hold)
    process, idle_mb, began = first.process, memory_mb(first.process.pid), time.monotonic()
    deployment = pool.deploy(pool.name)
    runs = [pool.start(deployment, crew=pool.name, inputs={"topic": str(number)}) for number in range(count)]

    def looks() -> dict[str, int]:
        return crew.ask("_facts")["looks"]

    wait_until(lambda: len(looks()) == count and all(looks().values()), "all waited for", seconds=900)
    begun, cpu = time.monotonic() - began, cpu_seconds(process)
    time.sleep(hold)
    busy, held_mb = (cpu_seconds(process) - cpu) / hold, memory_mb(process.pid)

    second = pool.worker("another") if by == "another" else None
    process.send(signal.SIGKILL)
    killed = time.monotonic()
    first.kill()
    time.sleep(0.3)  # requests that had left
    before = looks()
    if second is None:
        second, killed = pool.worker("bench"), time.monotonic()
    wait_until(lambda: all(n > before[run] for run, n in looks().items()), "all again", seconds=600, pause=0.1)
    again = time.monotonic() - killed
    crew.ask("_end")
    assert {pool.wait_for(run)["state_name"] for run in runs} == {"Completed"}
    crew.assert_each_once(count)
    held = {"memory_mb": held_mb, "run_kb": 1024 * (held_mb - idle_mb) / count, "core_percent": 100 * busy}
    report(f"taken over by {by}", run_begun_seconds=begun / count, **held, again_seconds=again)


if __name__ == "__main__":
    options = options_of(__doc__, "itself", "another", runs=300, hold=20.0)
    with tempfile.TemporaryDirectory() as folder:
        server = PrefectServer(Path(folder))  # which runs already: to be asked and named alone
        server.port = urlsplit(os.environ["PREFECT_API_URL"]).port or 4200
        pool = CrewPool(server, Path(folder), f"bench-{os.getpid()}", heartbeat=10)
        with pool, lean_server(math.inf) as crew:
            measure(pool, crew, options.what, options.runs, options.hold)
