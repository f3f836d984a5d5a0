"""What one run costs: functions of this package, asyncio tasks, requests to Prefect, and seconds on top of the crew's.

    python benchmarks/run.py --list     also print the functions, in the order in which they are entered

On the Prefect server of PREFECT_API_URL. The first run, which loads and opens what all later ones use, is not counted.
Functions are those that `run_crew` enters outside a flow, in every thread; requests and seconds are those of
`arun_crew` in a flow that is running.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from collections import Counter
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any
from urllib.parse import urlsplit

from figures import options_of, report, used
from lean_server import lean_server
from prefect import flow
from prefect.settings import PREFECT_API_URL

import prefect_crew
from prefect_crew import arun_crew, run_crew
from prefect_crew.crew import fast_polling
from support.prefect_server import drain, environment
from support.proxy import Proxy

PACKAGE = Path(prefect_crew.__file__).parent
LOGS = "POST /api/logs"
"""Prefect sends logs every two seconds, whoever runs."""


def trace_run(crew: Any) -> tuple[Counter[CodeType], list[str]]:
    """Run a crew; return this package's functions with their calls, and the coroutines that became asyncio tasks."""
    calls, tasks, create_task = Counter[CodeType](), list[str](), asyncio.BaseEventLoop.create_task

    def note(frame: FrameType, event: str, _: Any) -> None:
        # Not when an awaited coroutine goes on.
        if event == "call" and frame.f_lineno == frame.f_code.co_firstlineno:
            calls[frame.f_code] += 1

    def create(loop: asyncio.BaseEventLoop, coroutine: Any, **options: Any) -> Any:
        if is_ours(coroutine.cr_code):
            tasks.append(coroutine.cr_code.co_qualname)
        return create_task(loop, coroutine, **options)

    # Also the threads of the store, which run already; Python 3.11 cannot.
    profile: Any = getattr(threading, "setprofile_all_threads", threading.setprofile)

    def is_ours(code: CodeType) -> bool:
        return PACKAGE in Path(code.co_filename).parents

    asyncio.BaseEventLoop.create_task = create  # type: ignore[method-assign]
    profile(note)
    sys.setprofile(note)
    try:
        run_crew(crew, {"topic": "traced"})
    finally:
        sys.setprofile(None)
        profile(None)
        asyncio.BaseEventLoop.create_task = create_task  # type: ignore[method-assign]
    # A thread may still add one. A lambda, comprehension or generator belongs to the function that it stands in.
    ours = {code: calls[code] for code in tuple(calls) if is_ours(code) and not code.co_name.startswith("<")}
    return Counter(ours), tasks


def traced(*, listed: bool) -> dict[str, int]:
    with lean_server(0.0) as server, fast_polling():
        crew = server.crew()
        run_crew(crew, {"topic": "warm"})
        # Under load a request is sent again, which enters some more.
        calls, tasks = min((trace_run(crew) for _ in range(3)), key=lambda trace: len(trace[0]))
    if listed:
        print(*(f"{calls[code]:4}x {Path(code.co_filename).name} {code.co_qualname}" for code in calls), sep="\n")
        print("asyncio tasks:", *tasks, sep="\n       ")
    files = {code.co_filename for code in calls}
    return {"functions": len(calls), "files": len(files), "asyncio_tasks": len(tasks)}


def requested(times: int, seconds: float) -> dict[str, Any]:
    requests: list[list[str]] = []
    walls: list[float] = []
    with (
        lean_server(seconds) as server,
        Proxy(urlsplit(PREFECT_API_URL.value()).port or 4200) as proxy,
        environment({"PREFECT_API_URL": f"{proxy.url}/api"}),
    ):
        crew = server.crew()

        @flow(name="one", validate_parameters=False)
        async def several() -> None:
            for number in range(times + 1):
                before = len(proxy.requests)
                with used(walls):
                    await arun_crew(crew, {"topic": str(number)}, name=f"run-{number}")
                requests.append([line for line in proxy.requests[before:] if not line.startswith(LOGS)])

        asyncio.run(several())
        drain()  # while the proxy is there
    kinds = Counter(re.sub("[0-9a-f]{8}-[0-9a-f-]{27}", "ID", line) for lines in requests[1:] for line in lines)
    shown = "; ".join(f"{count / times:g} {kind.replace('/api/', '')}" for kind, count in kinds.most_common())
    return {"requests": median(map(len, requests[1:])), "kinds": shown, "extra_seconds": median(walls[1:]) - seconds}


if __name__ == "__main__":
    options = options_of(__doc__, list=False, times=5, seconds=2.0)
    logging.disable(logging.INFO)
    report("one run", **traced(listed=options.list), **requested(options.times, options.seconds))
