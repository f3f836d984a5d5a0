"""How a command ends: one exit code for each kind of error, and one readable paragraph about it.

This table is what `prefect-crew --help` shows, and docs/cli.md too; a test keeps the three equal.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prefect_crew.exceptions import (
    AnsweredError,
    AuthenticationError,
    BadRowsError,
    BatchBusyError,
    BatchCancelledError,
    BatchChangedError,
    BatchFailedError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    DatasetError,
    IdempotencyConflictError,
    InvalidCallError,
    InvalidInputsError,
    KickoffUncertainError,
    LedgerError,
    LedgerMissingError,
    NotFoundError,
    OutputError,
    OutputTypeError,
    PipelineFailedError,
    PrefectAwayError,
    RateLimitedError,
    ResponseFormatError,
    ReviewLimitError,
    ServerError,
)

if TYPE_CHECKING:
    from prefect_crew.cli._progress import RunBoard


class UsageError(Exception):
    """The command line itself makes no sense."""


class Exit(NamedTuple):
    """One exit code, what it means, and the errors that it stands for."""

    code: int
    meaning: str
    errors: tuple[type[BaseException], ...] = ()


EXITS = (
    Exit(0, "done"),
    Exit(1, "an error that nobody expected: --debug shows where", (InvalidCallError,)),
    Exit(2, "the command line is wrong", (UsageError,)),
    Exit(10, "the crew failed", (CrewFailedError,)),
    Exit(11, "the run was stopped", (CrewStoppedError, BatchCancelledError)),
    Exit(12, "the crew's server does not know the run any more", (CrewLostError,)),
    Exit(13, "a time budget is over; the crew may run on", (CrewTimeoutError,)),
    Exit(14, "nobody knows whether the kickoff started a run", (KickoffUncertainError,)),
    Exit(15, "the idempotency key belongs to another crew or other inputs", (IdempotencyConflictError,)),
    Exit(16, "inputs are missing, unknown or were refused", (InvalidInputsError,)),
    Exit(17, "the token was refused (401, 403)", (AuthenticationError,)),
    Exit(18, "no such crew or run (404)", (NotFoundError,)),
    Exit(19, "too many requests (429)", (RateLimitedError,)),
    Exit(20, "the crew's server is at fault (5xx)", (ServerError,)),
    Exit(21, "no answer from the crew's server", (CrewConnectionError,)),
    Exit(22, "an answer that is none of the known shapes", (ResponseFormatError,)),
    Exit(23, "the result does not fit the type that was asked for", (OutputTypeError,)),
    Exit(24, "another error answer of the crew's server", (CrewAPIError,)),
    Exit(25, "what was given cannot be used; nothing was sent", (ConfigurationError,)),
    Exit(26, "a file or a port cannot be used", (OSError,)),
    Exit(27, "asked for what the run, as it stands, does not allow", (CrewError, AnsweredError)),
    Exit(28, "steps of a pipeline failed", (PipelineFailedError,)),
    Exit(29, "doctor found something to mend"),
    Exit(30, "the Prefect API does not answer", (PrefectAwayError,)),
    Exit(31, "the Prefect API refused", ()),
    Exit(32, "a task asked for a person's answer too often", (ReviewLimitError,)),
    Exit(33, "rows of a batch failed, are uncertain, were not run, or cannot be run", (BatchFailedError,)),
    Exit(34, "a data set cannot be read, or rows of it cannot be run; nothing was sent", (DatasetError, BadRowsError)),
    Exit(
        35,
        "the batch has other rows or another ledger, or is run elsewhere",
        (BatchChangedError, LedgerMissingError, BatchBusyError),
    ),
    Exit(36, "the ledger or the output of a batch cannot be used", (LedgerError, OutputError)),
    Exit(130, "interrupted by Ctrl-C", (KeyboardInterrupt,)),
    Exit(141, "whoever read the output has gone (a closed pipe)", (BrokenPipeError,)),
    Exit(143, "ended by SIGTERM or SIGHUP", ()),
)

UNEXPECTED, USAGE, UNUSABLE, NOT_ALLOWED, FOUND, AWAY, REFUSED, ROWS = 1, 2, 25, 27, 29, 30, 31, 33
INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143
_CODES: dict[type[BaseException], int] = {kind: line.code for line in EXITS for kind in line.errors}


def _kinds(error: BaseException) -> dict[str, type[BaseException]]:
    """Return the error's classes by full name: those of Prefect and httpx are known here without importing them."""
    return {f"{kind.__module__}.{kind.__name__}": kind for kind in type(error).__mro__}


def signalled(error: BaseException) -> bool:
    """Return whether a signal ended the command: Ctrl-C, or SIGTERM, of which Prefect within a flow raises its own."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ in ("TerminatedError", "TerminationSignal")


def exit_code(error: BaseException, *, started: bool = False) -> int:
    """Return the exit code of an error. The most special of its classes that has one decides.

    Args:
        error: The error.
        started: Whether the command has kicked off or found a run: then no error means that nothing was sent.
    """
    code = _code(error)
    return NOT_ALLOWED if started and code == UNUSABLE else code


def _code(error: BaseException) -> int:
    kinds = _kinds(error)
    if "cyclopts.exceptions.CycloptsError" in kinds:
        return USAGE
    if signalled(error):
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED
    if "httpx.HTTPStatusError" in kinds:
        status: int = getattr(getattr(error, "response", None), "status_code", 0)
        return AWAY if status in (502, 503, 504) else REFUSED
    if "httpx.HTTPError" in kinds or _away(error):
        # Those of the crew's server are errors of our own by now.
        return AWAY
    if any(name.startswith("prefect.exceptions.") for name in kinds):
        return REFUSED
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), UNEXPECTED)


def _away(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "Failed to reach API" in str(error)


_OPTIONS = (
    "on_change|on_bad_row|on_failure|on_cancel|max_in_flight|kickoffs_per_second|kickoffs_at_once|max_kickoffs|"
    "retry_failed|task_per_row|output_type"
)
_ARGUMENT = re.compile(
    rf"\b(?:(?P<set>{_OPTIONS}|shards|deployment|ledger|format|encoding|every|schedule|allow_http)=(?P<value>'[^']*'|True|\w+|…)|"
    rf"(?P<told>{_OPTIONS})(?= is ))"
)
_BOTH = re.compile(r"\b\w+=(?:True|…)(?:, | \()(?P<option>--[\w-]+)(?P<end>\)?)")


def by_options(text: str) -> str:
    """Return a text that names arguments of functions with the options of the command line in their place."""

    def option(found: re.Match[str]) -> str:
        name = f"--{(found['set'] or found['told']).replace('_', '-')}"
        return name if found["value"] in (None, "True") else f"{name} {found['value'].strip(chr(39))}"

    def alone(found: re.Match[str]) -> str:
        # Of `(name=…, --name)` the bracket stays, that of `name=True (--name)` goes.
        return found["option"] + ("" if "(" in found[0] else found["end"])

    return _ARGUMENT.sub(option, _BOTH.sub(alone, text))


def paragraph(error: BaseException, run: RunBoard | None = None) -> str:
    """Return what a person reads about an error: what happened and what to do, without a traceback.

    Args:
        error: The error.
        run: The run that the command had kicked off or found by then.
    """
    code = exit_code(error)
    if signalled(error):
        return "Interrupted." if code == INTERRUPTED else "Ended by a signal."
    said = reason(error)
    if isinstance(error, CrewError) or code == USAGE:
        return by_options(said)
    if code == AWAY:
        return (
            f"The Prefect API does not answer ({type(error).__name__}: {said}). Start a server with "
            "`prefect server start`, or check PREFECT_API_URL: prefect-crew doctor."
        )
    if code == REFUSED:
        return f"The Prefect API refused: {_refusal(error) or said}. prefect-crew doctor looks at what it needs."
    if code == UNEXPECTED:
        about = "" if run is None else f" {_on_record(run)}"
        return f"{type(error).__name__}: {said}.{about} Nobody expected this error; --debug shows where it comes from."
    return said


def _on_record(run: RunBoard) -> str:
    """Return which run an unexpected error is about, and how its result is had all the same."""
    if run.idempotency_key is None:
        return f"Run {run.kickoff_id} was started."
    return f"Run {run.kickoff_id} was started and is on record: prefect-crew result {shlex.quote(run.idempotency_key)}."


def reason(error: BaseException) -> str:
    """Return an error's own text on one line; of a pydantic error without the values, one of which may be a token."""
    if "pydantic_core._pydantic_core.ValidationError" in _kinds(error):
        return _problems(error)
    return " ".join(str(error).split()) or type(error).__name__


def _refusal(error: Any) -> str | None:
    """Return what an HTTP error of the Prefect API says: httpx' own text is mostly a link."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    body: dict[str, Any] = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
    told = body.get("detail") or body.get("exception_message")
    asked = f"{response.request.method} {response.request.url.path}"
    said = f"{asked} was answered with {response.status_code}"
    return " ".join(f"{said}, {told}".split()) if told else said


def _problems(error: Any) -> str:
    problems: list[dict[str, Any]] = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, "))))
        for problem in problems
    )
