"""`prefect-crew`, the program. Nothing else imports this package.

It starts without Prefect, which takes two seconds to import: commands import what they need.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import zip_longest
from types import FrameType
from typing import Any

from prefect_crew.cli import _output

__all__ = ["main"]


class TerminatedError(SystemExit):
    """SIGTERM or SIGHUP arrived. It leaves as an exit does, so that what was started is ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process if left out.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    _output.debug("--debug" in own)
    arguments = [argument for argument in own if argument != "--debug"] + arguments[len(own) :]
    _hide_tokens(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a crew may write what this terminal's encoding does not have
            stream.reconfigure(errors="backslashreplace")
    with _signals(), warnings.catch_warnings():
        if not _output.debugging() and not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            return _run(arguments, as_json="--json" in own)
        finally:
            with _undisturbed():
                _leave()


def _hide_tokens(arguments: list[str]) -> None:
    _output.forget()
    _output.secret(os.environ.get("CREW_TOKEN", ""))
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == "--token":
            _output.secret(following)
        elif argument.startswith("--token="):
            _output.secret(argument.partition("=")[2])


def _run(arguments: list[str], *, as_json: bool) -> int:
    from prefect_crew.cli import _errors, _progress

    _progress.forget()
    try:
        from prefect_crew.cli.app import run

        return run(arguments)
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _errors.CLOSED
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            return _errors.CLOSED  # so Rich leaves, which draws the help
        if not isinstance(error, Exception) and not _errors.signalled(error):
            raise
        with _undisturbed():  # this is where every error becomes words
            return _report(error, as_json=as_json)


def _report(error: BaseException, *, as_json: bool) -> int:
    """Write an error for people, and with `--json` for programs; return its exit code."""
    from prefect_crew.cli import _errors, _progress
    from prefect_crew.exceptions import CrewError

    run = _progress.latest_run()
    code = _errors.exit_code(error, started=run is not None)
    said = _errors.paragraph(error, run)
    if _output.debugging():
        sys.stderr.write(_output.redact("".join(traceback.format_exception(error))))
    _output.note(said, "bold" if _errors.signalled(error) else "red")
    facts = {
        name: getattr(error, name, None) or getattr(run, name, None)
        for name in ("idempotency_key", "kickoff_id", "task", "flow_run_id")
    }
    page = _page_of(facts["flow_run_id"])
    if (task := facts["task"]) is not None and isinstance(error, CrewError):
        _output.note(f"The crew was last seen at task {task}.", "dim")
    if page:
        _output.note(page, "dim")
    if code == _errors.USAGE:
        _output.note("prefect-crew --help lists the commands; prefect-crew COMMAND --help their options.")
    if as_json:
        facts["flow_run_url"] = page
        about = {name: value for name, value in facts.items() if value is not None}
        _output.put_json({"error": {"type": type(error).__name__, "message": said, "exit_code": code, **about}})
    return code


def _page_of(its_id: object) -> str | None:
    """Return the page of the flow run that an error is about, where it is known."""
    if not isinstance(its_id, str):
        return None
    from prefect_crew.cli._prefect import flow_run_url

    return flow_run_url(its_id)


@contextmanager
def _signals() -> Generator[None]:
    """Let SIGTERM and SIGHUP leave as an error does: with what was started ended first."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise TerminatedError(143)

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        try:
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, leave)
        except ValueError:  # not the main thread: then signals are somebody else's
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Generator[None]:
    """Ignore a further Ctrl-C meanwhile: what is done then takes a few seconds at most."""
    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave() -> None:
    """End what the command has started."""
    if "prefect_crew.cli._prefect" in sys.modules:
        from prefect_crew.cli._prefect import end_embedded

        end_embedded()
