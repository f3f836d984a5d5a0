"""The program: its commands, its signals, and its errors as words and exit codes.

It starts without Prefect, which takes two seconds to import: commands import what they need.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from inspect import iscoroutine
from io import TextIOWrapper
from types import FrameType
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter

from prefect_crew.cli import _errors, _output, doctor, serve
from prefect_crew.cli import docs as documentation
from prefect_crew.cli import run as run_commands
from prefect_crew.cli._prefect import page_url, reach_prefect
from prefect_crew.exceptions import CrewError


def _shown(value: Any) -> Any:
    """Return a default as the help shows it: None where it is nothing."""
    return str(value) if value else None


app = App(
    name="prefect-crew",
    help="Run deployed CrewAI crews from Prefect: each run is started at most once, and never lost.",
    help_format="plaintext",
    help_epilogue="`prefect-crew docs` prints the documentation. PREFECT_API_URL or the Prefect profile names the "
    "Prefect server. --debug with any command shows the traceback of an error. Exit codes: 2 cannot be used, 3 failed, "
    "4 uncertain, 5 timeout, 6 rows, 1 any other error.",
    version=version("prefect-crew"),
    help_flags=["--help", "-h"],
    default_parameter=Parameter(negative=(), show_default=_shown),
)
LAZY = {
    "runs": ("runs:app", "Runs: list, stop and resolve them."),
    "reviews": ("reviews:app", "Runs that wait for a person: list them, and answer."),
    "costs": ("runs:costs", "Show what runs have used and cost, by crew, day, flow or batch."),
    "batch": ("batch:app", "Run a crew for every row of a data set, and follow such batches."),
    "crews": ("crews:app", "Store crews as Prefect blocks. To list them: prefect block ls."),
    "database": ("database:app", "Show where runs are recorded, or choose this place."),
    "deploy": ("deploy:deploy", "Deploy a crew or a pipeline, with a form that asks for its inputs."),
    "automations": (
        "deploy:automations",
        "Set up automations that begin crashed flow runs again, and that alert people.",
    ),
    "receiver": ("serve:receiver", "The webhook receiver, which turns webhooks of crews into Prefect events."),
}
"""Commands that are imported only when they run, because they import Prefect; each with its line in the list."""
GROUPS: dict[str, Sequence[Any]] = {
    "Try and check": (serve.demo, serve.init, serve.serve, doctor.doctor, documentation.docs),
    "Run a crew": (run_commands.run, run_commands.result, run_commands.inputs),
    "Follow and decide": ("runs", "reviews", "batch", "costs"),
    "Set up": ("crews", "deploy", "database", "automations", "receiver"),
}
for number, (title, commands) in enumerate(GROUPS.items()):
    group = Group(title, sort_key=number)
    for each in commands:
        place: dict[str, Any] = {"group": group, "sort_key": len(tuple(app))}
        if isinstance(each, str):
            app.command(f"{__package__}.{LAZY[each][0]}", name=each, help=LAZY[each][1], **place)
        else:
            app.command(each, **place)


class TerminatedError(SystemExit):
    """SIGTERM arrived. It leaves as an exit does, so that everything that the command started ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments after the program's name; if left out, the arguments of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    invocation = _output.begin(debug="--debug" in own)
    arguments = [argument for argument in own if argument != "--debug"] + arguments[len(own) :]
    invocation.hide(os.environ.get("CREW_TOKEN", ""))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a crew may write what this terminal's encoding does not have
            stream.reconfigure(errors="backslashreplace")
    with _terminable(), warnings.catch_warnings():
        if not invocation.debug and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            return run(arguments)
        except BaseException as error:
            if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # Rich exits so
                # The reader has gone, as `head` does. Python would complain once more when it flushes.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return _errors.CLOSED_PIPE
            if not isinstance(error, Exception) and not _errors.is_signal(error):
                raise
            return _report(error, as_json=bool(re.search(r"(^| )(-o|--output)[ =]?json( |$)", " ".join(own))))


def run(arguments: list[str]) -> int:
    """Run one line of arguments; return the exit code that the command chose, 0 if it chose none.

    If a command needs the Prefect API, this reaches the API before the command's coroutine runs.

    Raises:
        CycloptsError: The line has a wrong command or option.
        Exception: Any error of the command.
    """
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    answer: Any = command(*bound.args, **bound.kwargs)
    if iscoroutine(answer):
        with closing(answer):
            reach_prefect(lasting=arguments[0] in ("automations", "deploy"))
            answer = asyncio.run(answer)
    sys.stdout.flush()  # so that a pipe that is closed is noticed here at the latest
    return answer if isinstance(answer, int) else 0


def _report(error: BaseException, *, as_json: bool) -> int:
    """Write an error for people, and with `-o json` for programs; return its exit code."""
    watched = _output.current.seen
    error = _errors.own_error(error, watched)
    code, text = _errors.exit_code(error), _errors.message(error, watched and watched.started)
    if _output.current.debug:
        sys.stderr.write(_output.redact("".join(traceback.format_exception(error))))
    _output.note(text, "bold" if _errors.is_signal(error) else "red")
    facts = {
        name: getattr(error, name, None) or getattr(watched, name, None)
        for name in ("idempotency_key", "kickoff_id", "task", "flow_run_id")
    }
    facts["flow_run_url"] = page_url(facts["flow_run_id"])
    facts_of_run = {name: value for name, value in facts.items() if value is not None}
    if "task" in facts_of_run and isinstance(error, CrewError):
        _output.note(f"The crew was last seen at task {facts_of_run['task']}.", "dim")
    if facts_of_run.get("idempotency_key", "") not in text:
        _output.note(f"Idempotency key {facts_of_run['idempotency_key']}", "dim")
    if "flow_run_url" in facts_of_run:
        _output.note(facts_of_run["flow_run_url"], "dim")
    if isinstance(error, CycloptsError):
        _output.note("prefect-crew --help lists the commands; prefect-crew COMMAND --help lists their options.")
    if as_json:
        _output.put_json({"error": {"type": type(error).__name__, "message": text, "exit_code": code, **facts_of_run}})
    return code


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise TerminatedError(_errors.TERMINATED)


@contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM raise in the main thread; Python allows no handlers in others."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
