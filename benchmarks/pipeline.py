"""What a pipeline costs on top of its crews: 20 steps in 5 layers of a 0.2 s crew, against a running Prefect server.

The critical path is 5 × 0.2 s = 1.0 s; each step of it should cost at most 150 ms on top. Next to it is the floor:
the same shape of Prefect's own tasks, two a step as a crew has, that sleep for as long. Needs PREFECT_API_URL.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from prefect_crew import CrewStep, DeployedCrew, WaitPolicy, arun_pipeline
from prefect_crew.devserver import CrewScript, CrewServer

LAYERS, WIDE, SECONDS = 5, 4, 0.2


def steps(crew: DeployedCrew) -> list[CrewStep]:
    made: list[CrewStep] = []
    for layer in range(LAYERS):
        before = [f"s{layer - 1}x{column}" for column in range(WIDE)] if layer else []
        text = " ".join(f"{{{{ {name}.output }}}}" for name in before) or "{{ topic }}"
        made += [CrewStep(f"s{layer}x{column}", crew, {"text": text[:2000]}) for column in range(WIDE)]
    return made


@task(cache_policy=NO_CACHE)
async def sleeping(seconds: float) -> None:
    await asyncio.sleep(seconds)


@flow
async def floor() -> float:
    """Return the seconds of the same shape without crews."""

    async def step() -> None:
        await sleeping(0.0)
        await sleeping(SECONDS)

    started = time.perf_counter()
    for _ in range(LAYERS):
        await asyncio.gather(*(step() for _ in range(WIDE)))
    return time.perf_counter() - started


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    task = {"name": "work", "seconds": SECONDS, "output": "done"}
    script = CrewScript.model_validate({"name": "timed", "inputs": ["text"], "tasks": [task]})
    times: list[float] = []
    with CrewServer(script) as server:
        crew = DeployedCrew(url=server.url, token=server.token, wait=WaitPolicy(initial=0.1, max_interval=0.1))

        @flow
        async def measured() -> None:
            for _ in range(runs + 1):
                started = time.perf_counter()
                await arun_pipeline(steps(crew), {"topic": "Lisbon"}, name="benchmark")
                times.append(time.perf_counter() - started)

        await measured()
        floors = [await floor() for _ in range(runs + 1)][1:]
        assert server.kickoffs == (runs + 1) * LAYERS * WIDE
    critical = LAYERS * SECONDS
    walls = {"median": statistics.median(times[1:]), "best": min(times[1:]), "floor": statistics.median(floors)}
    for name, wall in walls.items():
        print(f"{name}: {wall:.2f} s, {(wall - critical) / LAYERS * 1000:.0f} ms a step of the critical path on top")


if __name__ == "__main__":
    asyncio.run(main())
