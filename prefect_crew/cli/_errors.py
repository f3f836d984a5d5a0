"""How a command ends: its exit code, and one readable paragraph about an error.

A table in docs/reference/cli.md has the meaning of each exit code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cyclopts import CycloptsError
from pydantic import ValidationError

from prefect_crew._text import problems_of
from prefect_crew.exceptions import (
    AnswerUncertainError,
    BatchFailedError,
    ConfigurationError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    DatasetError,
    InvalidInputsError,
    KickoffUncertainError,
    NoResultError,
    SessionBlockedError,
)

OTHER, ROWS, CLOSED_PIPE, TERMINATED = 1, 6, 141, 143
CODES: Mapping[int, Sequence[type[BaseException]]] = {
    2: (CycloptsError, ConfigurationError, InvalidInputsError, DatasetError, NoResultError),
    3: (CrewFailedError, CrewStoppedError, CrewLostError),
    4: (KickoffUncertainError, AnswerUncertainError, SessionBlockedError),
    5: (CrewTimeoutError,),
    ROWS: (BatchFailedError,),
    130: (KeyboardInterrupt,),
    CLOSED_PIPE: (BrokenPipeError,),
}


def is_signal(error: BaseException) -> bool:
    """Return whether a signal ended the command: Ctrl-C, or SIGTERM, for which Prefect has an exception of its own."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ in ("TerminatedError", "TerminationSignal")


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: that of the first of its classes that has one."""
    if isinstance(error, DatasetError) and error.rows:
        return ROWS
    codes = (code for kind in type(error).__mro__ for code, kinds in CODES.items() if kind in kinds)
    return next(codes, TERMINATED if is_signal(error) else OTHER)


def message(error: BaseException, run: str | None = None) -> str:
    """Return one line about an error for a person: the event, and the next step.

    Args:
        error: The error.
        run: A sentence about the run that the command has started or found by then, for an unexpected error.
    """
    if is_signal(error):
        return "Interrupted." if isinstance(error, KeyboardInterrupt) else "Ended by a signal."
    text = reason(error)
    if isinstance(error, CrewError | CycloptsError):
        return text
    if isinstance(error, OSError) and error.args:
        return text
    return " ".join(
        filter(None, [f"{type(error).__name__}: {text}.", run, "This is unexpected. Add --debug to see more."])
    )


def own_error(error: BaseException, run: object = None) -> BaseException:
    """Return this package's error if an option does not fit its field, or if the Prefect API cannot be reached or
    refuses the request; else the error as it is.

    `run` is the run that the command has started or found by then: no option is at fault any more.
    """
    if isinstance(error, CrewError | CycloptsError) or is_signal(error):
        return error
    if isinstance(error, ValidationError) and run is None:
        return ConfigurationError(reason(error))
    from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, is_away, prefect_error

    if is_away(error):
        return prefect_error(error, "Start a server with `prefect server start`, or check PREFECT_API_URL.")
    return prefect_error(error, "") if isinstance(error, PREFECT_ERRORS) else error


def reason(error: BaseException) -> str:
    """Return an error's text on one line, without the values of a pydantic error, one of which may be a token."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    return "; ".join(problems_of(error))
