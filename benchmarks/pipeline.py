"""What a pipeline costs on top of its crews: 20 steps in 5 layers of a 0.2 s crew, against a running Prefect server.

    python benchmarks/pipeline.py layers      the critical path is 5 × 0.2 s = 1.0 s
    python benchmarks/pipeline.py line        three steps in a line, a 2 s crew: the first pipeline of a process

Next to the layers is the floor: the same shape of Prefect's own tasks, two a step as a crew has, that sleep for as
long. Needs PREFECT_API_URL; without it, Prefect's embedded server runs, and its start is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

from figures import report
from lean_server import TOKEN, LeanServer, lean_server
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from prefect_crew import CrewStep, DeployedCrew, WaitPolicy, arun_pipeline

LAYERS, WIDE, SECONDS = 5, 4, 0.2
LINE, LINE_SECONDS = 3, 2.0


def steps(crew: DeployedCrew, layers: int, wide: int) -> list[CrewStep]:
    made: list[CrewStep] = []
    for layer in range(layers):
        before = [f"s{layer - 1}x{column}" for column in range(wide)] if layer else []
        text = " ".join(f"{{{{ {name}.output }}}}" for name in before) or "{{ topic }}"
        made += [CrewStep(f"s{layer}x{column}", crew, {"topic": text[:2000]}) for column in range(wide)]
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


async def layers(runs: int, server: LeanServer) -> None:
    times: list[float] = []
    often = WaitPolicy(initial=0.1, max_interval=0.1)
    crew: Any = DeployedCrew(url=server.url, token=TOKEN, wait=often)  # type: ignore[arg-type]

    @flow
    async def measured() -> None:
        for _ in range(runs + 1):
            started = time.perf_counter()
            await arun_pipeline(steps(crew, LAYERS, WIDE), {"topic": "Lisbon"}, name="benchmark")
            times.append(time.perf_counter() - started)

    await measured()
    floors = [await floor() for _ in range(runs + 1)][1:]
    assert server.counts()["kickoffs"] == (runs + 1) * LAYERS * WIDE
    seconds, least = statistics.median(times[1:]), statistics.median(floors)
    critical = LAYERS * SECONDS
    on_top = {"step_ms": 1000 * (seconds - critical) / LAYERS, "floor_step_ms": 1000 * (least - critical) / LAYERS}
    report("pipeline", seconds=seconds, floor_seconds=least, **on_top)


async def line(server: LeanServer) -> None:
    crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]

    @flow
    async def measured() -> float:
        started = time.perf_counter()
        await arun_pipeline(steps(crew, LINE, 1), {"topic": "Lisbon"}, name="benchmark")
        return time.perf_counter() - started

    report("pipeline in a line", seconds=await measured(), crews_seconds=LINE * LINE_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "line"])
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with lean_server(SECONDS if given.what == "layers" else LINE_SECONDS) as server:
        asyncio.run(layers(given.runs, server) if given.what == "layers" else line(server))


if __name__ == "__main__":
    main()
