"""Many runs at once in one flow, or for each of them two tasks of Prefect's own, of which the second sleeps as long.

    python benchmarks/burst.py crews --runs 100 --seconds 8
    python benchmarks/burst.py tasks --runs 100 --seconds 8     nothing that starts and awaits a run is sooner

On the Prefect server of PREFECT_API_URL.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from figures import report, used
from lean_server import TOKEN, lean_server
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from prefect_crew import DeployedCrew, arun_crew


@task(cache_policy=NO_CACHE)
async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def tasks(seconds: float) -> None:
    await sleep(0.0)
    await sleep(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["crews", "tasks"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long a crew works")
    options = parser.parse_args()
    with lean_server(options.seconds) as server:
        crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]

        @flow(name="burst", validate_parameters=False)
        async def burst() -> None:
            with used() as work:
                runs = range(options.runs)
                if options.what == "tasks":
                    await asyncio.gather(*(tasks(options.seconds) for _ in runs))
                else:
                    await asyncio.gather(*(arun_crew(crew, {"topic": str(number)}) for number in runs))
            report(options.what, runs=options.runs, seconds=work.seconds, cpu_seconds=work.cpu_seconds)

        asyncio.run(burst())
        if options.what == "crews":
            server.assert_each_once(options.runs)


if __name__ == "__main__":
    main()
