"""Callers in processes of their own, and a crew's server that tells when to kill them.

    python -m outcomes.callers < orders

That process has imported the package, and forks one for each order: a script without its two seconds of imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from prefect_crew.devserver import CrewServer
from support.processes import alive
from support.waiting import LIMIT, wait_until


@dataclass(frozen=True)
class Ended:
    """How a caller ended: killed, or with values of its result or report, or with an error's class and text."""

    killed: bool = False
    result: Mapping[str, Any] | None = None
    error: str | None = None
    text: str = ""


class Caller:
    """One caller. `kill` is SIGKILL from outside."""

    def __init__(self, pid: int, file: Path) -> None:
        self.pid, self.file = pid, file

    def kill(self) -> None:
        if alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)

    def ended(self, seconds: float = 100.0) -> Ended:
        """Wait for its end."""
        wait_until(lambda: not alive(self.pid), f"the end of caller {self.pid}", seconds=seconds)
        return Ended(**json.loads(self.file.read_text())) if self.file.exists() else Ended(killed=True)


class Callers:
    """The process that forks; a context manager. `folder` gets outcomes and logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0

    def __enter__(self) -> Self:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command, pipe = [sys.executable, "-m", "outcomes.callers"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        return self

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        orders, answers = self._process.stdin, self._process.stdout
        assert orders
        assert answers
        return orders, answers

    def __exit__(self, *_: object) -> None:
        orders, answers = self._pipes
        orders.close()
        self._process.wait(LIMIT)
        answers.close()

    def start(self, crew: Mapping[str, Any], call: Mapping[str, Any], *, batch: bool = False) -> Caller:
        """Start a call of `run_crew`, or of `run_batch`, with the settings of this process.

        `crew` has the fields of the block, `call` the arguments; `"review": "yes"` is a function that approves.
        """
        self._number += 1
        file = self.folder / f"{self._number}.json"
        env = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
        orders, answers = self._pipes
        print(json.dumps([env, str(file), crew, call, batch]), file=orders, flush=True)
        return Caller(int(answers.readline()), file)


class WatchedServer(CrewServer):
    """A crew's server that calls `on(place, when, number)` for each request, in its event loop.

    `when` is "arrived" before the work is begun, and "answered" once the whole answer was handed to the network.
    """

    def __init__(self, spec: Any, *, on: Callable[[str, str, int], None], **options: Any) -> None:
        super().__init__(spec, **options)
        numbers, inner = Counter[str](), self.asgi

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await inner(scope, receive, send)
                return
            place = scope["path"].split("/")[1]
            numbers[place] += 1
            number, messages = numbers[place], [await receive()]
            while messages[-1].get("more_body"):
                messages.append(await receive())

            async def received() -> Any:
                return messages.pop(0) if messages else await receive()

            async def sending(message: Any) -> None:
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    on(place, "answered", number)

            on(place, "arrived", number)
            await inner(scope, received, sending)

        self.asgi = watched  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    """Fork a caller for each line of standard input, and print its process id."""
    import prefect_crew.cli  # noqa: F401  imports nothing that a script would not
    from prefect_crew import run_batch, run_crew  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for them
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            continue
        status = 1
        try:
            _call(*json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


def _call(env: dict[str, str], name: str, crew: dict[str, Any], call: dict[str, Any], batch: bool) -> None:
    """Be the caller."""
    from prefect.context import refresh_global_settings_context

    from outcomes.driver import approve
    from prefect_crew import CrewError, DeployedCrew, run_batch, run_crew
    from support.prefect_server import drain

    file = Path(name)
    log = os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(env)
    refresh_global_settings_context()
    random.seed()  # the fork has its parent's
    if call.get("review") == "yes":
        call["review"] = approve
    ended: dict[str, Any]
    try:
        result: Any = (run_batch if batch else run_crew)(DeployedCrew(**crew), **call)
        names = ("completed", "failed", "uncertain", "kickoffs") if batch else ("kickoff_id", "output")
        ended = {"result": {name: getattr(result, name) for name in names}}
    except CrewError as error:
        ended = {"error": type(error).__name__, "text": str(error)}
    drain()
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(ended))
    partial.rename(file)


if __name__ == "__main__":
    main()
