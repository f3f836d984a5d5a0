"""A process that has imported everything and forks one that runs what it is sent: a script without its two seconds.

    python zygote.py < orders

An order is one line of JSON, a list of scripts to run side by side; its answer is one line, a list of exit statuses.
It starts no thread and no event loop of its own, so that a fork is as good as a fresh interpreter.
"""

from __future__ import annotations

import json
import os
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

__all__ = ["Ended", "Forks", "Script", "Zygote"]


@dataclass(frozen=True)
class Script:
    """A script that runs a crew.

    Attributes:
        crew: Fields of its block.
        inputs, idempotency_key: As `run_crew` takes them.
        kill: Where it dies.
        session: As `run_crew` takes it.
        approves: Whether a function answers the crew's question.
        dies_after: Seconds from its start after which it dies, wherever it is then.
    """

    crew: Mapping[str, Any]
    inputs: Mapping[str, str]
    idempotency_key: str | None
    kill: Kill | None = None
    session: str | None = None
    dies_after: float | None = None
    approves: bool = False


@dataclass(frozen=True)
class Ended:
    """How a script ended: `killed`, or with a result, or with an error's name and text."""

    killed: bool
    kickoff_id: str | None = None
    output: str | None = None
    error: str | None = None
    text: str = ""


class Forks:
    """The process; a context manager. `env` makes it a client of a Prefect server, `folder` gets outcomes and logs.

    `program` is the file that it runs.
    """

    program = __file__

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self._env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._orders = 0
        self._running: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._running = subprocess.Popen(
            [sys.executable, self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._env
        )
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
        self._running.wait(30)
        answers.close()

    def _answer(self, order: object) -> Any:
        orders, answers = self._pipes
        orders.write(json.dumps(order) + "\n")
        orders.flush()
        answer = answers.readline()
        assert answer, "the process that forks died"
        return json.loads(answer)


class Zygote(Forks):
    """The process that runs scripts."""

    def run(self, *scripts: Script) -> list[Ended]:
        """Run scripts side by side, each in a process of its own, and return how they ended."""
        self._orders += 1
        files = [self.folder / f"{self._orders}-{number}" for number in range(len(scripts))]
        own = {"database": database_url()[0]}
        order = [{**asdict(script), **own, "file": str(file)} for script, file in zip(scripts, files, strict=True)]
        return [self._ended(file, status) for file, status in zip(files, self._answer(order), strict=True)]

    def _ended(self, file: Path, status: int) -> Ended:
        said = file.with_suffix(".json")
        if status == -9:
            return Ended(killed=True)
        assert said.exists(), f"a script ended with {status}:\n{file.with_suffix('.log').read_text()}"
        return Ended(killed=False, **json.loads(said.read_text()))


def main() -> None:
    """Take orders until standard input ends."""
    import prefect_crew.cli  # noqa: F401  imports nothing that a script would not
    from prefect_crew import flows  # noqa: F401

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
    from prefect_crew import CrewError, DeployedCrew, run_crew
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
    crew = DeployedCrew(flow=script["session"] is not None, **script["crew"])
    try:
        options = {name: script[name] for name in ("idempotency_key", "session")}
        options |= {"review": approve} if script["approves"] else {}
        result = run_crew(crew, script["inputs"], **options)
        said = {"kickoff_id": result.kickoff_id, "output": result.output}
    except CrewError as error:
        said = {"error": type(error).__name__, "text": str(error)}
    drain()
    file.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
