"""What a pipeline costs on top of its crews: 20 steps in 5 layers of a 0.2 s crew.

Next to it is the floor: the same shape of Prefect's own tasks, two a step as a crew has, that sleep for as long. On the
Prefect server of PREFECT_API_URL.
"""

from __future__ import annotations

import asyncio
from statistics import median
from typing import Any

from burst import tasks
from figures import options_of, report, used
from lean_server import lean_server
from prefect import flow

from prefect_crew import CrewStep, WaitPolicy, arun_pipeline

LAYERS, WIDE, SECONDS = 5, 4, 0.2


def steps(crew: Any) -> list[CrewStep]:
    made: list[CrewStep] = []
    for layer in range(LAYERS):
        before = [f"s{layer - 1}x{column}" for column in range(WIDE)] if layer else []
        text = " ".join(f"{{{{ {name}.output }}}}" for name in before) or "{{ topic }}"
        made += [CrewStep(f"s{layer}x{column}", crew, {"topic": text}) for column in range(WIDE)]
    return made


@flow(validate_parameters=False)
async def measured(runs: int) -> None:
    times, floors = list[float](), list[float]()
    with lean_server(SECONDS) as server:
        crew = server.crew(wait=WaitPolicy(initial=0.1, max_interval=0.1))
        for _ in range(runs + 1):  # the first loads and opens what the others use
            with used(times):
                await arun_pipeline(steps(crew), {"topic": "Lisbon"}, name="benchmark")
            with used(floors):
                for _ in range(LAYERS):
                    await asyncio.gather(*(tasks(SECONDS) for _ in range(WIDE)))
        server.assert_each_once((runs + 1) * LAYERS * WIDE)
    seconds, floor = median(times[1:]), median(floors[1:])
    step_ms, floor_step_ms = (1000 * (one - LAYERS * SECONDS) / LAYERS for one in (seconds, floor))
    report("pipeline", seconds=seconds, floor_seconds=floor, step_ms=step_ms, floor_step_ms=floor_step_ms)


if __name__ == "__main__":
    asyncio.run(measured(options_of(__doc__, runs=5).runs))
