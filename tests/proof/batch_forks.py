"""A process that has imported everything and forks one that runs a batch, and dies in it where it has to.

    python batch_forks.py < orders

An order is one line of JSON; its answer is a line with the exit status. See `zygote.py`, which does it for single runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect_crew.runs.database import URL_SETTING, database_url
from proof.kills import Kill, arm
from proof.zygote import Forks

__all__ = ["KILLS", "WHILE_STARTING", "BatchForks", "Call", "Report"]

WHILE_STARTING = ("begin", "started", "ended", "transaction", "kickoff", "status")
"""Points at which a batch may die while its rows are started, by their names in `kills.HOOKS`."""
KILLS = (*WHILE_STARTING, "enter-rows", "export", "export-page")
"""All points of a batch's life at which it may die."""


@dataclass(frozen=True)
class Call:
    """A call of `run_batch`.

    Attributes:
        crew: Fields of its block.
        dataset, options: As `run_batch` takes them, plain values only; `wait` is a WaitPolicy's fields.
        kill: Where it dies. `kill_after`: after how many seconds it does.
        page: Rows of an export that are written at once.
    """

    crew: Mapping[str, Any]
    dataset: str
    options: Mapping[str, Any]
    kill: Kill | None = None
    kill_after: float | None = None
    page: int | None = None


@dataclass(frozen=True)
class Report:
    """How a call ended: killed, with a report, or with an error."""

    killed: bool = False
    report: dict[str, Any] = field(default_factory=dict[str, Any])
    error: str = ""


class BatchForks(Forks):
    """The process that runs batches."""

    program = __file__

    def run(self, call: Call) -> Report:
        """Run a batch in a process of its own, and return how that ended."""
        self._orders += 1
        file = self.folder / f"batch-{self._orders}"
        answer = self._answer({**asdict(call), "file": str(file), "database": database_url()[0]})
        if answer == -signal.SIGKILL:
            return Report(killed=True)
        said = file.with_suffix(".json")
        assert said.exists(), f"a batch ended with {answer}:\n{file.with_suffix('.log').read_text()}"
        return Report(**json.loads(said.read_text()))


def main() -> None:
    """Take orders until standard input ends."""
    import prefect_crew.cli  # noqa: F401  imports nothing that a script would not
    from prefect_crew.batches import run  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _child(order: dict[str, Any]) -> None:
    status = 1
    try:
        _batch(order)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # what atexit would do is the parent's


def _batch(order: dict[str, Any]) -> None:
    import random

    os.environ[URL_SETTING] = order["database"]
    from prefect_crew import CrewError, DeployedCrew, WaitPolicy, run_batch
    from prefect_crew.batches import output
    from support.prefect_server import drain

    file = Path(order["file"])
    log = os.open(file.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    random.seed()  # the fork has its parent's
    if order["kill"]:
        arm(Kill(**order["kill"]))
    if order["kill_after"] is not None:
        timer = threading.Timer(order["kill_after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    output.PAGE = order["page"] or output.PAGE
    options = order["options"]
    try:
        report = run_batch(
            DeployedCrew(**order["crew"]), order["dataset"], **{**options, "wait": WaitPolicy(**options["wait"])}
        )
        said: dict[str, Any] = {"report": report.as_dict()}
    except CrewError as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    drain()
    file.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
