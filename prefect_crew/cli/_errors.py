"""How a command ends: its exit code, and one readable paragraph about an error.

The exit codes are a table in docs/reference/cli.md too; a test keeps the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, cast

from prefect_crew.exceptions import (
    BadRowsError,
    BatchFailedError,
    ConfigurationError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    InvalidInputsError,
    KickoffUncertainError,
)


class UsageError(Exception):
    """The command line itself makes no sense."""


OTHER, USAGE, ROWS, INTERRUPTED, CLOSED_PIPE, TERMINATED = 1, 2, 6, 130, 141, 143
EXIT_CODES: Mapping[int, str] = {
    0: "done",
    OTHER: "any other error; with `-o json`, `error.type` tells which. Also: `doctor` found a problem",
    USAGE: "the command line, an input or a setting cannot be used",
    3: "the run failed, was stopped, or is lost",
    4: "a kickoff is uncertain: a person has to resolve it",
    5: "a time limit was reached; the run may go on",
    ROWS: "rows of a batch failed, are uncertain, or cannot be run",
    INTERRUPTED: "interrupted by Ctrl-C",
    CLOSED_PIPE: "the reader of the output has gone (a closed pipe)",
    TERMINATED: "ended by SIGTERM or SIGHUP",
}
_CODES: Mapping[type[BaseException], int] = {
    UsageError: USAGE,
    ConfigurationError: USAGE,
    InvalidInputsError: USAGE,
    CrewFailedError: 3,
    CrewStoppedError: 3,
    CrewLostError: 3,
    KickoffUncertainError: 4,
    CrewTimeoutError: 5,
    BatchFailedError: ROWS,
    BadRowsError: ROWS,
    KeyboardInterrupt: INTERRUPTED,
    BrokenPipeError: CLOSED_PIPE,
}
CHECK_API = "Start a server with `prefect server start`, or check PREFECT_API_URL: prefect-crew doctor."


def _class_names(error: BaseException) -> list[str]:
    """Return the full names of an error's classes: so those of Prefect and httpx are known without their imports."""
    return [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]


def is_signal(error: BaseException) -> bool:
    """Return whether a signal ended the command: Ctrl-C, or SIGTERM, for which Prefect has an exception of its own."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ in ("TerminatedError", "TerminationSignal")


def is_usage(error: BaseException) -> bool:
    """Return whether the command line itself makes no sense."""
    return isinstance(error, UsageError) or "cyclopts.exceptions.CycloptsError" in _class_names(error)


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: that of the first of its classes that has one."""
    if is_usage(error):
        return USAGE
    if is_signal(error) and not isinstance(error, KeyboardInterrupt):
        return TERMINATED
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), OTHER)


def message(error: BaseException, run: str | None = None) -> str:
    """Return what a person reads about an error, on one line: what happened and what to do.

    Args:
        error: The error.
        run: A sentence about the run that the command has started or found by then, for an unexpected error.
    """
    if is_signal(error):
        return "Interrupted." if isinstance(error, KeyboardInterrupt) else "Ended by a signal."
    said, names = reason(error), _class_names(error)
    if isinstance(error, CrewError) or is_usage(error):
        return by_options(_suggest(error, said))
    status = getattr(getattr(error, "response", None), "status_code", None)
    # Errors of httpx come from Prefect's client: those of the crew's client are errors of this package.
    if ("httpx.HTTPError" in names and status in (None, 502, 503, 504)) or "Failed to reach API" in said:
        return f"The Prefect API does not answer ({type(error).__name__}: {said}). {CHECK_API}"
    if status is not None or any(name.startswith("prefect.exceptions.") for name in names):
        return f"The Prefect API refused: {_refusal(error) or said}. To check what it needs: prefect-crew doctor."
    if isinstance(error, OSError) and error.args:
        return said
    return " ".join(filter(None, [f"{type(error).__name__}: {said}.", run, "This is unexpected: --debug shows more."]))


def reason(error: BaseException) -> str:
    """Return an error's own text on one line; of a pydantic error without the values, one of which may be a token."""
    if "pydantic_core._pydantic_core.ValidationError" not in _class_names(error):
        return " ".join(str(error).split()) or type(error).__name__
    problems = cast("Any", error).errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, "))))
        for one in problems
    )


_SUGGESTION = re.compile(r' Did you mean "?--?[\w-]+"?\?')


def _suggest(error: BaseException, said: str) -> str:
    """Return what is said of an unknown option with the option that is nearest to it, letters swapped or not.

    Never --yes: whoever means another option would confirm what was not asked yet.
    """
    given: Any = getattr(error, "token", None)
    if (
        given is None
        or not _SUGGESTION.search(said)
        or "cyclopts.exceptions.UnknownOptionError" not in _class_names(error)
    ):
        return said
    typed = str(given.keyword or given.value).partition("=")[0]

    def nearness(name: str) -> float:
        letters = SequenceMatcher(None, sorted(typed), sorted(name)).ratio()
        return (SequenceMatcher(None, typed, name).ratio() + letters) / 2

    names = [
        name for argument in cast("Any", error).argument_collection for name in argument.names if name.startswith("--")
    ]
    near = max(names, key=nearness)  # there is one, since one was suggested
    return _SUGGESTION.sub("" if near == "--yes" else f" Did you mean {near}?", said)


def _refusal(error: Any) -> str | None:
    """Return what an HTTP error of the Prefect API says: httpx' own text is mostly a link."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    try:
        body = response.json()
        detail = body.get("detail") or body.get("exception_message") or ""
    except (ValueError, AttributeError):
        detail = ""
    answered = f"{response.request.method} {response.request.url.path} was answered with {response.status_code}"
    return ", ".join(filter(None, (answered, " ".join(str(detail).split()))))


_ARGUMENT = re.compile(
    r"(?<!in Python )\b(on_change|on_bad_row|on_failure|max_in_flight|max_kickoffs|retry_failed|output_type|rows|"
    r"ledger|format|encoding|every|schedule|allow_http|force_new|crew|option)=(?:True\b|'([^']*)'|(…|\d+))"
)
_TWICE = re.compile(r"((--[\w-]+)(?: …)?)(?:, \2(?![\w-])| \(\2\))")  # a text may name the option beside the argument


def by_options(text: str) -> str:
    """Return a text that names arguments of functions with the options of the command line in their place."""

    def option(found: re.Match[str]) -> str:
        return " ".join(filter(None, (f"--{found[1].replace('_', '-')}", found[2], found[3])))

    return _TWICE.sub(r"\1", _ARGUMENT.sub(option, text))
