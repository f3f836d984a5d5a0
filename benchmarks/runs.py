"""What a run costs in a flow that is running already: time on top of the crew's own, requests, connections.

    python benchmarks/runs.py one --times 5         `arun_crew`, a 2 s crew, webhooks on
    python benchmarks/runs.py one --count           the same through a proxy that counts the requests to Prefect
    python benchmarks/runs.py many --runs 8 100     so many runs at the same time, compared with one

Against the Prefect server of PREFECT_API_URL. The first run of the process, which loads and opens what all later ones
use, is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import time
from collections import Counter
from statistics import median
from typing import Any

from figures import report
from lean_server import TOKEN, LeanServer, lean_server
from servers import prefect_server_of, receiver

from support.prefect_server import drain, environment
from support.proxy import Proxy

LOGS = "POST /api/logs"
"""Prefect sends logs every two seconds, whoever runs."""


async def one(given: argparse.Namespace, server: LeanServer, proxy: Proxy | None) -> None:
    from prefect import flow

    from prefect_crew import DeployedCrew, arun_crew

    crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]
    requests: list[str] = proxy.requests if proxy else []
    extra: list[float] = []
    made: list[list[str]] = []
    connections: list[int] = []

    @flow(name="one", validate_parameters=False)
    async def run() -> None:
        for number in range(given.times + 1):
            before, opened = len(requests), server.counts()["connections"]
            began = time.perf_counter()
            await arun_crew(crew, {"topic": str(number)}, name=f"run-{number}")
            extra.append(time.perf_counter() - began - given.seconds)
            made.append([request for request in requests[before:] if not request.startswith(LOGS)])
            connections.append(server.counts()["connections"] - opened)

    await run()
    if proxy is None:
        report("one run", extra_seconds=median(extra[1:]), connections=median(connections[1:]), each_seconds=extra[1:])
        return
    shapes = Counter(re.sub("[0-9a-f]{8}-[0-9a-f-]{27}", "ID", request) for one in made[1:] for request in one)
    report(
        "requests of one run",
        requests=median(map(len, made[1:])),
        shapes={shape: round(count / given.times, 2) for shape, count in shapes.most_common()},
    )


async def many(given: argparse.Namespace, server: LeanServer) -> None:
    from prefect import flow

    from prefect_crew import DeployedCrew, WaitPolicy, arun_crew

    often = WaitPolicy(initial=given.seconds, factor=1, max_interval=0.1, jitter=0)
    crew: Any = DeployedCrew(url=server.url, token=TOKEN, wait=often)  # type: ignore[arg-type]
    took: dict[int, list[float]] = {}

    @flow(name="many", validate_parameters=False)
    async def run() -> None:
        counts = [1, *(count for _ in range(given.times) for count in (1, given.runs[0])), *given.runs[1:]]
        for turn, count in enumerate(counts):
            began = time.perf_counter()
            await asyncio.gather(*(arun_crew(crew, {"topic": f"{turn} {number}"}) for number in range(count)))
            if turn:
                took.setdefault(count, []).append(time.perf_counter() - began)
            await asyncio.sleep(0.5)

    await run()
    found = {f"runs_{count}_seconds": median(seconds) for count, seconds in took.items()}
    alone = found["runs_1_seconds"]
    longer = {f"runs_{count}_longer_seconds": found[f"runs_{count}_seconds"] - alone for count in given.runs}
    report("runs at the same time", **found, **longer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["one", "many"])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a crew works")
    parser.add_argument("--count", action="store_true", help="count the requests to Prefect, for `one`")
    parser.add_argument("--runs", type=int, nargs="+", default=[8, 100], help="for `many`")
    given = parser.parse_args()
    prefect = prefect_server_of()
    with contextlib.ExitStack() as stack:
        if given.what == "many":
            asyncio.run(many(given, stack.enter_context(lean_server(given.seconds))))
            return
        stack.enter_context(receiver())
        server = stack.enter_context(lean_server(given.seconds))
        proxy = stack.enter_context(Proxy(prefect.port)) if given.count else None
        if proxy:
            stack.enter_context(environment({"PREFECT_API_URL": f"{proxy.url}/api"}))
        asyncio.run(one(given, server, proxy))
        drain()  # while the proxy is there


if __name__ == "__main__":
    main()
