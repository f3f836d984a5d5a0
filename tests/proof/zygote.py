"""A process that has imported everything and forks one that runs what it is sent: a script without its two seconds.

    python zygote.py < orders

An order is one line of JSON, a list of scripts to run side by side; its answer is one line, a list of exit statuses.
It starts no thread and no event loop of its own, so that a fork is as good as a fresh interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from prefect_crew.runs.database import URL_SETTING, database_url
from proof.kills import Kill, arm, die_after
from support.waiting import LIMIT

__all__ = ["Ended", "Script", "Zygote"]


@dataclass(frozen=True)
class Script:
    """A script that runs a crew, or with a `dataset` a batch.

    Attributes:
        crew: Fields of its block.
        call: As `run_crew` or `run_batch` take it, plain values only; `review="yes"` is a function that approves.
        kill: Where it dies.
        dies_after: Seconds from its start after which it dies, wherever it is then.
        page: Rows of an export that are written at once.
    """

    crew: Mapping[str, Any]
    call: Mapping[str, Any]
    kill: Kill | None = None
    dies_after: float | None = None
    page: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a script ended: `killed`, or with a result or a report, or with an error's name and text."""

    killed: bool = False
    kickoff_id: str | None = None
    output: str | None = None
    report: Mapping[str, Any] | None = None
    error: str | None = None
    text: str = ""

    def counts(self) -> Mapping[str, Any]:
        """Return the report of a batch. Fail if there is none."""
        assert self.report is not None, self
        return self.report


class Zygote:
    """The process; a context manager. `env` makes it a client of a Prefect server, `folder` gets outcomes and logs.

    Scripts use the crew database of the test that sends them.
    """

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self._env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._orders = 0
        self._running: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._running = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=self._env)
        return self

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._running, "used outside of its `with`"
        assert self._running.stdin
        assert self._running.stdout
        return self._running.stdin, self._running.stdout

    def __exit__(self, *_: object) -> None:
        orders, answers = self._pipes
        orders.close()
        assert self._running
        self._running.wait(LIMIT)
        answers.close()

    def run(self, *scripts: Script) -> list[Ended]:
        """Run scripts side by side, each in a process of its own, and return how they ended."""
        self._orders += 1
        files = [self.folder / f"{self._orders}-{number}" for number in range(len(scripts))]
        own = {"database": database_url()[0]}
        orders, answers = self._pipes
        order = [{**asdict(script), **own, "file": str(file)} for script, file in zip(scripts, files, strict=True)]
        print(json.dumps(order), file=orders, flush=True)
        answer = answers.readline()
        assert answer, "the process that forks died"
        return [self._ended(file, status) for file, status in zip(files, json.loads(answer), strict=True)]

    def run_one(self, script: Script) -> Ended:
        """Run a script, and return how it ended."""
        (ended,) = self.run(script)
        return ended

    def _ended(self, file: Path, status: int) -> Ended:
        said = file.with_suffix(".json")
        if status == -signal.SIGKILL:
            return Ended(killed=True)
        assert said.exists(), f"a script ended with {status}:\n{file.with_suffix('.log').read_text()}"
        return Ended(**json.loads(said.read_text()))


def main() -> None:
    """Take orders until standard input ends."""
    import prefect_crew.cli  # noqa: F401  imports nothing that a script would not
    from prefect_crew import flows  # noqa: F401
    from prefect_crew.batches import run  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    for line in sys.stdin:
        children = [_fork(script) for script in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(statuses), flush=True)


def _fork(script: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _script(script)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # what atexit would do is the zygote's


def _script(script: dict[str, Any]) -> None:
    import random

    os.environ[URL_SETTING] = script["database"]
    from outcomes.driver import approve
    from prefect_crew import CrewError, DeployedCrew, WaitPolicy, run_batch, run_crew
    from prefect_crew.batches import output
    from support.prefect_server import drain

    file = Path(script["file"])
    log = os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    random.seed()  # the fork has its parent's
    if script["kill"]:
        arm(Kill(**script["kill"]))
    if script["dies_after"] is not None:
        die_after(script["dies_after"])
    output.PAGE = script["page"] or output.PAGE
    crew, call = DeployedCrew(**script["crew"]), script["call"]
    said: dict[str, Any]
    try:
        if "dataset" in call:
            said = {"report": run_batch(crew, **call | {"wait": WaitPolicy(**call["wait"])}).as_dict()}
        else:
            result = run_crew(crew, **call | ({"review": approve} if call.get("review") == "yes" else {}))
            said = {"kickoff_id": result.kickoff_id, "output": result.output}
    except CrewError as error:
        said = {"error": type(error).__name__, "text": str(error)}
    drain()
    file.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
