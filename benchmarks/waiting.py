"""How soon waits see their crews' ends, what that costs in status calls, and what idle waits hold.

    python benchmarks/waiting.py lag --runs 100 --way webhooks      all end at once, on command
    python benchmarks/waiting.py lag --runs 100 --way polling       runs of --seconds, begun at once
    python benchmarks/waiting.py idle --runs 1000                   memory and CPU of waits in one process, webhooks on
    python benchmarks/waiting.py floor --runs 1000                  the same of tasks of Prefect, two a run

One async flow holds all the runs, against the Prefect server of PREFECT_API_URL. The crew server and the receiver are
processes of their own. A lag is from a run's end on the crew's server to the return of `arun_crew`; `seen` is until the
status call that showed it, so the rest is what is stored on the Prefect server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import math
import os
import time
from dataclasses import replace
from typing import Any

from figures import cpu_seconds, lags, memory_mb, report
from lean_server import TOKEN, LeanServer, lean_server
from servers import prefect_server_of, receiver

AT_ONCE = 20
"""Runs that are kicked off at the same time."""


async def lag(given: argparse.Namespace, server: LeanServer) -> None:
    from prefect import flow

    from prefect_crew import CrewState, DeployedCrew
    from prefect_crew.blocks import crew_of
    from prefect_crew.flows import run_loaded_crew
    from prefect_crew.runs.options import RunOptions

    seen: dict[str, float] = {}
    returned: dict[str, float] = {}
    kicked_off = 0

    def note(_: Any, status: Any) -> None:
        nonlocal kicked_off
        if status is None:
            kicked_off += 1
        elif status.state is CrewState.COMPLETED:
            seen.setdefault(status.kickoff_id, time.time())

    crew = replace(crew_of(DeployedCrew(url=server.url, token=TOKEN)), on_status=note)  # type: ignore[arg-type]

    async def one(number: int) -> None:
        options = RunOptions.of(name=f"run-{number}")
        result = await run_loaded_crew(crew, {"topic": str(number)}, options)
        returned[result.kickoff_id] = time.time()

    @flow(name="waiting", validate_parameters=False)
    async def run() -> float:
        runs: list[asyncio.Task[None]] = []
        while kicked_off < given.runs:
            while len(runs) < min(given.runs, kicked_off + AT_ONCE):
                runs.append(asyncio.ensure_future(one(len(runs))))
            await asyncio.sleep(0.02)
            for failed in (run for run in runs if run.done()):
                failed.result()
        if given.way == "webhooks":
            await asyncio.sleep(given.settle + given.runs / 100)
            await asyncio.to_thread(server.ask, "_end", "POST")
        cpu = time.process_time()
        await asyncio.gather(*runs)
        return time.process_time() - cpu

    cpu = await run()
    ends = server.ask("_ends")
    report(
        f"lag with {given.way}",
        runs=given.runs,
        **lags([returned[run] - end for run, end in ends.items()]),
        **lags([seen[run] - end for run, end in ends.items()], "seen_"),
        run_calls=server.counts()["status_calls"] / given.runs,
        run_cpu_ms=1000 * cpu / given.runs,
    )


async def idle(given: argparse.Namespace, server: LeanServer) -> None:
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from prefect_crew import DeployedCrew, kickoff_crew, wait_for_crew

    crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]
    at_once = asyncio.Semaphore(AT_ONCE)
    waiting = 0

    @task(cache_policy=NO_CACHE)
    async def sleep(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "slept"

    async def one(number: int) -> None:
        nonlocal waiting
        async with at_once:
            begun = await (sleep(0.0) if given.what == "floor" else kickoff_crew(crew, {"topic": str(number)}))
        waiting += 1
        await (sleep(1e6) if given.what == "floor" else wait_for_crew(crew, begun))

    async def begin(count: int) -> list[asyncio.Task[None]]:
        expected = waiting + count
        runs = [asyncio.create_task(one(expected + number)) for number in range(count)]
        while waiting < expected:
            await asyncio.sleep(0.5)
            for run in runs:
                if run.done():
                    run.result()
        await asyncio.sleep(given.settle)
        gc.collect()
        return runs

    @flow(name="idle", validate_parameters=False)
    async def run() -> None:
        runs = await begin(AT_ONCE)  # what is loaded and opened once is no run's
        before = memory_mb()
        runs += await begin(given.runs)
        held = memory_mb() - before
        cpu, calls, began = cpu_seconds(os.getpid()), server.counts()["status_calls"], time.monotonic()
        await asyncio.sleep(given.over)
        took = time.monotonic() - began
        report(
            given.what,
            runs=given.runs,
            run_kb=1024 * held / given.runs,
            memory_mb=memory_mb(),
            core_percent=100 * (cpu_seconds(os.getpid()) - cpu) / took,
            calls_a_second=(server.counts()["status_calls"] - calls) / took,
        )
        for one in runs:
            one.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    await run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lag", "idle", "floor"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--way", choices=["webhooks", "polling"], default="webhooks")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a crew works, with polling")
    parser.add_argument("--over", type=float, default=20.0, help="seconds over which idle waits are watched")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds from the last kickoff to what is measured")
    given = parser.parse_args()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    prefect_server_of()
    polls = given.what == "lag" and given.way == "polling"
    with contextlib.ExitStack() as stack:
        if not polls:
            stack.enter_context(receiver())
        server = stack.enter_context(lean_server(given.seconds if polls else math.inf))
        asyncio.run(lag(given, server) if given.what == "lag" else idle(given, server))


if __name__ == "__main__":
    main()
