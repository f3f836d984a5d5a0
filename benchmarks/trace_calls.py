"""How much of this package one run enters: the functions below its two tasks, and the asyncio tasks that they make.

Runs a crew that is done at once, outside of a flow, against the Prefect server of PREFECT_API_URL. A first run warms
caches of the process. Three more runs are traced in every thread, and the run with the fewest functions counts. Code
above the bodies of the tasks `kickoff_crew` and `wait_for_crew` is not counted: the public function, the flow, Prefect.

Goal: at most 130 functions and 3 asyncio tasks. `--list` prints them by file, in the order in which they are entered.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from figures import report
from lean_server import TOKEN, lean_server

import prefect_crew
from prefect_crew import DeployedCrew, kickoff_crew, run_crew, wait_for_crew
from prefect_crew.crew import fast_polling

PACKAGE = Path(prefect_crew.__file__).parent
below = ContextVar("below", default=False)
"""Whether the body of one of the two tasks is around. A task that asyncio makes copies the context."""


@dataclass
class Trace:
    """What one run enters below its two tasks."""

    calls: Counter[CodeType] = field(default_factory=Counter[CodeType])
    tasks: list[str] = field(default_factory=list[str])
    """The names of the coroutines that became asyncio tasks."""

    @property
    def functions(self) -> dict[Path, list[CodeType]]:
        """The functions of this package by file."""
        ours: dict[Path, list[CodeType]] = {}
        for code in tuple(self.calls):  # a thread may still note one
            path = Path(code.co_filename)
            # A lambda, a comprehension or a generator belongs to the function that it stands in.
            if PACKAGE in path.parents and not code.co_name.startswith("<"):
                ours.setdefault(path.relative_to(PACKAGE), []).append(code)
        return ours


def trace_run(crew: DeployedCrew, inputs: dict[str, Any]) -> Trace:
    """Run a crew and return what that entered."""
    trace = Trace()

    def note(frame: FrameType, event: str, _: Any) -> None:
        # Not when an awaited coroutine goes on: the callers of the two tasks go on with their bodies.
        if event == "call" and below.get() and frame.f_lineno == frame.f_code.co_firstlineno:
            trace.calls[frame.f_code] += 1

    create_task = asyncio.BaseEventLoop.create_task

    def created(loop: asyncio.BaseEventLoop, coroutine: Any, **options: Any) -> Any:
        path = Path(coroutine.cr_code.co_filename)
        if below.get() and PACKAGE in path.parents:
            trace.tasks.append(coroutine.cr_code.co_qualname)
        return create_task(loop, coroutine, **options)

    with _bodies_marked():
        asyncio.BaseEventLoop.create_task = created  # type: ignore[method-assign]
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            run_crew(crew, inputs)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            asyncio.BaseEventLoop.create_task = create_task  # type: ignore[method-assign]
    return trace


@contextmanager
def _bodies_marked() -> Iterator[None]:
    tasks: list[Any] = [kickoff_crew, wait_for_crew]
    bodies = [(task, task.fn) for task in tasks]

    def marked(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        async def call(*args: Any, **kwargs: Any) -> Any:
            token = below.set(True)
            try:
                return await body(*args, **kwargs)
            finally:
                below.reset(token)

        return call

    for task, body in bodies:
        task.fn = marked(body)
    try:
        yield
    finally:
        for task, body in bodies:
            task.fn = body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every function")
    is_listed = parser.parse_args().list
    logging.disable(logging.INFO)
    with lean_server(0.0) as server, fast_polling():
        crew = DeployedCrew(url=server.url, token=TOKEN)
        run_crew(crew, {"topic": "warm"})
        # Under load a request is sent again, which enters some more.
        traces = [trace_run(crew, {"topic": "traced"}) for _ in range(3)]
    trace = min(traces, key=lambda trace: sum(map(len, trace.functions.values())))
    for path, codes in trace.functions.items():
        print(f"{len(codes):4} {path}")
        if is_listed:
            for code in codes:
                print(f"       {trace.calls[code]:4}x {code.co_qualname}")
    if is_listed:
        print("asyncio tasks:", *trace.tasks, sep="\n       ")
    functions = [code for codes in trace.functions.values() for code in codes]
    calls = sum(trace.calls[code] for code in functions)
    report("one run", functions=len(functions), files=len(trace.functions), calls=calls, asyncio_tasks=len(trace.tasks))


if __name__ == "__main__":
    main()
