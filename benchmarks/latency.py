"""How long after a crew's end `arun_crew` returns, and how many status requests that took.

Runs scripted crews of 2, 10 and 60 s on the local crew server inside one async flow against a running Prefect server
(PREFECT_API_URL), next to the fixed 10 s poll of the API's own sample and the fixed 1 s poll of crewai_tools. All of
them run side by side in one process, so that they meet the same machine.

For the first the goal is: total at most 2.0 s + the last poll's lag + 0.25 s.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from prefect import flow

from prefect_crew import CrewClient, CrewState, DeployedCrew, arun_crew
from prefect_crew.devserver import CrewScript, CrewServer


def script(seconds: float) -> CrewScript:
    tasks = [{"name": "work", "seconds": seconds, "output": "done"}]
    return CrewScript.model_validate({"name": "timed", "inputs": [], "tasks": tasks})


async def fixed_poll(server: CrewServer, interval: float, seconds: float) -> tuple[float, int]:
    async with CrewClient(server.url, server.token) as client:
        started = time.perf_counter()
        kickoff_id = await client.kickoff({})
        looks = 0
        while True:
            await asyncio.sleep(interval)
            looks += 1
            if (await client.status(kickoff_id)).state is CrewState.COMPLETED:
                return time.perf_counter() - started - seconds, looks


async def ours(server: CrewServer, seconds: float) -> tuple[float, int]:
    crew = DeployedCrew(url=server.url, token=server.token)

    @flow(name=f"latency-{seconds:g}", validate_parameters=False)
    async def run() -> float:
        started = time.perf_counter()
        await arun_crew(crew, {})
        return time.perf_counter() - started

    total = await run()
    return total - seconds, server.counters.requests["status"]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="+", default=[2, 10, 60])
    print("crew s | way | lag s | status requests")
    for seconds in parser.parse_args().seconds:
        with CrewServer(script(seconds)) as own, CrewServer(script(seconds)) as other:
            mine, ten, one = await asyncio.gather(
                ours(own, seconds), fixed_poll(other, 10, seconds), fixed_poll(other, 1, seconds)
            )
        for way, (lag, looks) in {"arun_crew": mine, "fixed 10 s": ten, "fixed 1 s": one}.items():
            print(f"{seconds:6g} | {way} | {lag:.2f} | {looks}")


if __name__ == "__main__":
    asyncio.run(main())
