"""What one run costs: functions of this package, asyncio tasks, requests to Prefect, and seconds on top of the crew's.

    python benchmarks/run.py --list     also print the functions by file, in the order in which they are entered

On the Prefect server of PREFECT_API_URL. The first run, which loads and opens what all later ones use, is not counted.
Functions are those that `run_crew` enters outside a flow, in every thread; requests and seconds are those of
`arun_crew` in a flow that is running.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any
from urllib.parse import urlsplit

from figures import report
from lean_server import TOKEN, lean_server
from prefect import flow
from prefect.settings import PREFECT_API_URL

import prefect_crew
from prefect_crew import DeployedCrew, arun_crew, run_crew
from prefect_crew.crew import fast_polling
from support.prefect_server import drain, environment
from support.proxy import Proxy

PACKAGE = Path(prefect_crew.__file__).parent
LOGS = "POST /api/logs"
"""Prefect sends logs every two seconds, whoever runs."""


@dataclass
class Trace:
    """What one run enters."""

    calls: Counter[CodeType] = field(default_factory=Counter[CodeType])
    tasks: list[str] = field(default_factory=list[str])
    """The names of the coroutines that became asyncio tasks."""

    def by_file(self) -> dict[Path, list[CodeType]]:
        """Return the functions of this package."""
        files: dict[Path, list[CodeType]] = {}
        for code in tuple(self.calls):  # a thread may still add one
            path = Path(code.co_filename)
            # A lambda, a comprehension or a generator belongs to the function that it stands in.
            if PACKAGE in path.parents and not code.co_name.startswith("<"):
                files.setdefault(path.relative_to(PACKAGE), []).append(code)
        return files


def trace_run(crew: DeployedCrew) -> Trace:
    """Run a crew and return what that entered."""
    trace, create_task = Trace(), asyncio.BaseEventLoop.create_task

    def note(frame: FrameType, event: str, _: Any) -> None:
        # Not when an awaited coroutine goes on.
        if event == "call" and frame.f_lineno == frame.f_code.co_firstlineno:
            trace.calls[frame.f_code] += 1

    def create(loop: asyncio.BaseEventLoop, coroutine: Any, **options: Any) -> Any:
        if PACKAGE in Path(coroutine.cr_code.co_filename).parents:
            trace.tasks.append(coroutine.cr_code.co_qualname)
        return create_task(loop, coroutine, **options)

    asyncio.BaseEventLoop.create_task = create  # type: ignore[method-assign]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run_crew(crew, {"topic": "traced"})
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        asyncio.BaseEventLoop.create_task = create_task  # type: ignore[method-assign]
    return trace


def traced(*, listed: bool) -> dict[str, int]:
    with lean_server(0.0) as server, fast_polling():
        crew = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]
        run_crew(crew, {"topic": "warm"})
        # Under load a request is sent again, which enters some more.
        trace = min((trace_run(crew) for _ in range(3)), key=lambda trace: sum(map(len, trace.by_file().values())))
    files = trace.by_file()
    for path, codes in files.items() if listed else ():
        lines = (f"       {trace.calls[code]:4}x {code.co_qualname}" for code in codes)
        print(f"{len(codes):4} {path}", *lines, sep="\n")
    if listed:
        print("asyncio tasks:", *trace.tasks, sep="\n       ")
    functions = [code for codes in files.values() for code in codes]
    return {"functions": len(functions), "files": len(files), "asyncio_tasks": len(trace.tasks)}


def requested(times: int, seconds: float) -> dict[str, Any]:
    requests: list[list[str]] = []
    extra: list[float] = []
    with (
        lean_server(seconds) as server,
        Proxy(urlsplit(PREFECT_API_URL.value()).port or 4200) as proxy,
        environment({"PREFECT_API_URL": f"{proxy.url}/api"}),
    ):
        crew: Any = DeployedCrew(url=server.url, token=TOKEN)  # type: ignore[arg-type]

        @flow(name="one", validate_parameters=False)
        async def several() -> None:
            for number in range(times + 1):
                before, began = len(proxy.requests), time.perf_counter()
                await arun_crew(crew, {"topic": str(number)}, name=f"run-{number}")
                extra.append(time.perf_counter() - began - seconds)
                requests.append([line for line in proxy.requests[before:] if not line.startswith(LOGS)])

        asyncio.run(several())
        drain()  # while the proxy is there
    kinds = Counter(re.sub("[0-9a-f]{8}-[0-9a-f-]{27}", "ID", line) for lines in requests[1:] for line in lines)
    shown = "; ".join(f"{count / times:g} {kind.replace('/api/', '')}" for kind, count in kinds.most_common())
    return {"requests": median(map(len, requests[1:])), "kinds": shown, "extra_seconds": median(extra[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every function")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long the crew works")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    report("one run", **traced(listed=options.list), **requested(options.times, options.seconds))


if __name__ == "__main__":
    main()
