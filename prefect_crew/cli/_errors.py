"""How a command ends: its exit code, and one readable paragraph about an error.

A table in docs/reference/cli.md has the meaning of each exit code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cyclopts import CycloptsError
from pydantic import ValidationError

from prefect_crew._text import problems_of
from prefect_crew.exceptions import (
    AnswerUncertainError,
    BadRowsError,
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
    RunNotFoundError,
    SessionBlockedError,
)

OTHER, ROWS, CLOSED_PIPE, TERMINATED = 1, 6, 141, 143
CODES: Mapping[int, Sequence[type[BaseException]]] = {
    2: (CycloptsError, ConfigurationError, InvalidInputsError, DatasetError, RunNotFoundError),
    3: (CrewFailedError, CrewStoppedError, CrewLostError),
    4: (KickoffUncertainError, AnswerUncertainError, SessionBlockedError),
    5: (CrewTimeoutError,),
    ROWS: (BatchFailedError, BadRowsError),
    130: (KeyboardInterrupt,),
    CLOSED_PIPE: (BrokenPipeError,),
}


def is_signal(error: BaseException) -> bool:
    """Return whether a signal ended the command: Ctrl-C, or SIGTERM, for which Prefect has an exception of its own."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ in ("TerminatedError", "TerminationSignal")


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: that of the first of its classes that has one."""
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
    response: Any = getattr(error, "response", None)
    if response is not None or any(kind.__module__ == "prefect.exceptions" for kind in type(error).__mro__):
        refusal = text if response is None else _refusal(response)
        return f"The Prefect API refused: {refusal}. To check it, run: prefect-crew doctor."
    if isinstance(error, OSError) and error.args:
        return text
    return " ".join(
        filter(None, [f"{type(error).__name__}: {text}.", run, "This is unexpected. Add --debug to see more."])
    )


def own_error(error: BaseException, run: object = None) -> BaseException:
    """Return this package's error if an option does not fit its field, or if the Prefect API cannot be reached or
    refuses the key; else the error as it is.

    `run` is the run that the command has started or found by then: no option is at fault any more.
    """
    if isinstance(error, CrewError | CycloptsError) or is_signal(error):
        return error
    if isinstance(error, ValidationError) and run is None:
        return ConfigurationError(reason(error))
    from prefect_crew._internal.prefect_errors import is_away_or_refuses_key, prefect_error

    if not is_away_or_refuses_key(error):
        return error
    return prefect_error(error, "Start a server with `prefect server start`, or check PREFECT_API_URL.")


def reason(error: BaseException) -> str:
    """Return an error's text on one line, without the values of a pydantic error, one of which may be a token."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    return "; ".join(problems_of(error))


def _refusal(response: Any) -> str:
    """Return the reason in an answer of the Prefect API, because the text of httpx's error is mostly a link."""
    try:
        body = response.json()
        detail = body.get("detail") or body.get("exception_message") or ""
    except (ValueError, AttributeError):
        detail = ""
    answered = f"{response.request.method} {response.request.url.path} was answered with {response.status_code}"
    return ", ".join(filter(None, (answered, " ".join(str(detail).split()))))
