"""Many runs at once in one flow, or for each of them two tasks of Prefect's own, of which the second sleeps as long.

    python benchmarks/burst.py crews --runs 100 --seconds 8
    python benchmarks/burst.py tasks --runs 100 --seconds 8     nothing that starts and awaits a run is sooner

On the Prefect server of PREFECT_API_URL.
"""

from __future__ import annotations

import asyncio

from figures import options_of, report, used
from lean_server import lean_server
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from prefect_crew import arun_crew


@task(cache_policy=NO_CACHE)
async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def tasks(seconds: float) -> None:
    await sleep(0.0)
    await sleep(seconds)


@flow(name="burst", validate_parameters=False)
async def burst(what: str, runs: int, seconds: float) -> None:
    wall, cpu = list[float](), list[float]()
    with lean_server(seconds) as server:
        crew = server.crew()
        with used(wall, cpu):
            one_run = (lambda _: tasks(seconds)) if what == "tasks" else (lambda n: arun_crew(crew, {"topic": str(n)}))
            await asyncio.gather(*map(one_run, range(runs)))
        if what == "crews":
            server.assert_each_once(runs)
    report(what, runs=runs, seconds=wall[0], cpu_seconds=cpu[0])


if __name__ == "__main__":
    options = options_of(__doc__, "crews", "tasks", runs=100, seconds=8.0)
    asyncio.run(burst(options.what, options.runs, options.seconds))
