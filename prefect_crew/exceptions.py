"""Every error that this package raises on purpose.

    CrewError
    ├── ConfigurationError           a URL, token, id, input or option that cannot be used; also a ValueError
    ├── InvalidCallError             called where or when it cannot be; also a RuntimeError
    ├── CrewAPIError                 the crew's server answered with an error
    │   ├── AuthenticationError      401, 403
    │   ├── NotFoundError            404
    │   ├── InvalidInputsError       400, 422, and before any kickoff
    │   ├── RateLimitedError         429
    │   └── ServerError              5xx
    ├── CrewConnectionError          no answer: refused, reset, timed out, DNS, TLS
    ├── ResponseFormatError          an answer that is none of the known shapes
    ├── OutputTypeError              a completed run whose result does not fit the `output_type`
    ├── KickoffUncertainError        the kickoff may or may not have started a run
    ├── IdempotencyConflictError          the idempotency key belongs to another crew or other inputs
    ├── CrewFailedError              the crew ran and failed
    ├── CrewStoppedError             the run was stopped
    ├── CrewLostError                the server no longer knows the run
    ├── CrewTimeoutError             a time budget is over; the crew may run on
    ├── AnsweredError                a person's question has its answer already
    ├── ReviewLimitError             a task asked for a person's answer too often
    ├── PipelineFailedError          at least one step of a pipeline failed
    ├── BatchFailedError             not every row of a batch completed
    ├── BatchCancelledError          the flow run of a batch was cancelled
    ├── BatchBusyError               another process works on the batch
    ├── BatchChangedError            other rows or another crew than the batch was begun with
    ├── DatasetError                 a data set cannot be read
    │   └── BadRowsError             rows of it cannot be run
    ├── LedgerError                  the ledger of a batch cannot be read or written
    ├── LedgerMissingError           the batch is kept in another ledger
    ├── OutputError                  the output of a batch cannot be written
    └── PrefectAwayError             the Prefect API does not answer (command line)

Each message says what happened, to which run, and what to do next. The facts are attributes too, so that code never
has to parse a message. All of them survive pickling, since Prefect stores exceptions that way.
"""

from __future__ import annotations

import copyreg
import shlex
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from prefect_crew.states import CrewState

__all__ = [
    "EXCERPT",
    "AnsweredError",
    "AuthenticationError",
    "BadRowsError",
    "BatchBusyError",
    "BatchCancelledError",
    "BatchChangedError",
    "BatchFailedError",
    "ConfigurationError",
    "CrewAPIError",
    "CrewConnectionError",
    "CrewError",
    "CrewFailedError",
    "CrewLostError",
    "CrewStoppedError",
    "CrewTimeoutError",
    "DatasetError",
    "IdempotencyConflictError",
    "InvalidCallError",
    "InvalidInputsError",
    "KickoffUncertainError",
    "LedgerError",
    "LedgerMissingError",
    "NotFoundError",
    "OutputError",
    "OutputTypeError",
    "PipelineFailedError",
    "PrefectAwayError",
    "RateLimitedError",
    "ResponseFormatError",
    "ReviewLimitError",
    "ServerError",
    "by_reason",
    "excerpt",
    "listed_names",
    "listed_rows",
    "one_line",
    "plain",
    "with_guesses",
]


# What could move the cursor, change the title or turn the direction of a line, in text from a crew.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
} | {ord(char): f"[U+{ord(char):04X}]" for char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}

EXCERPT = 500
"""Characters of an error body that an error keeps."""


def plain(text: str) -> str:
    """Return text from outside fit for a terminal: nothing in it steers the terminal."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return text from outside as part of one line, of a log or of a terminal."""
    return " ".join(plain(text).split())


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return `text` on one line, cut to `limit` characters with a note of how much is missing."""
    flat = one_line(text)
    return flat if len(flat) <= limit else f"{flat[:limit]}… ({len(flat) - limit} more characters)"


_NAMES, _NAME = 30, 80
"""Names that an error lists, and characters of each: a server may name any number of any length."""


def listed_names(names: Sequence[str]) -> str:
    """Return names for people, on one line and not too many."""
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"{', '.join(excerpt(name, _NAME) for name in names[:_NAMES])}{more}"


def with_guesses(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Return unknown names for people, each with the known one that is nearest to it, if one is near."""
    near = [name for name in islice(known, 200) if len(name) <= _NAME]  # what it costs grows with all of these

    def guessed(name: str) -> str:
        found = get_close_matches(name, near, n=1) if len(name) <= _NAME else []
        return f"{name} (did you mean {found[0]}?)" if found else name

    return listed_names([guessed(name) for name in unknown[:_NAMES]] + [*unknown[_NAMES:]])


class CrewError(Exception):
    """Root of all errors of this package. Catch it to catch everything that can go wrong with a crew.

    Attributes:
        idempotency_key: The run's key, where the error is about a run that has one.
    """

    idempotency_key: str | None = None

    def __init__(self, *args: Any) -> None:
        # A crew's words stand in most errors, and errors are printed to terminals and logs by others than us.
        super().__init__(*(plain(part) if isinstance(part, str) else part for part in args))

    def add(self, text: str) -> None:
        """Say something more after its text."""
        self.args = (plain(f"{self} {text}"),)

    def about(self, idempotency_key: str, crew: str) -> None:
        """Name the run that it is about, where its text does not."""
        self.idempotency_key = idempotency_key
        if idempotency_key not in str(self):
            self.add(f"This was about run {idempotency_key!r} of crew {crew}.")

    def __reduce__(self) -> Any:
        # The subclasses take keyword arguments only, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InvalidCallError(CrewError, RuntimeError):
    """A function or an object was used where, or when, it cannot be: a mistake in the code that calls it."""


class ConfigurationError(CrewError, ValueError):
    """What was given cannot be used: a URL, a token, an id, inputs that cannot be sent. Nothing was sent."""


class CrewAPIError(CrewError):
    """The crew's server answered with an error.

    Attributes:
        status_code: The HTTP status.
        title: The short error of the body, if it had one.
        message: The long one, if it had one.
        body: An excerpt of the body, at most 500 characters.
        method, path: The request, without the host's credentials or a query.
        kickoff_id: The run that the request was about, if any.
    """

    advice = "Look at the crew's page, and at the body above."

    def __init__(
        self,
        *,
        status_code: int,
        method: str,
        path: str,
        title: str | None = None,
        message: str | None = None,
        body: str = "",
        kickoff_id: str | None = None,
    ) -> None:
        self.status_code = status_code
        self.method = method
        self.path = path
        self.title = title
        self.message = message
        self.body = excerpt(body)
        self.kickoff_id = kickoff_id
        super().__init__(self._text())

    def _text(self) -> str:
        said = ": ".join(part for part in (self.title, self.message) if part) or self.body or "an empty body"
        run = f" (run {self.kickoff_id})" if self.kickoff_id else ""
        return f"{self.method} {self.path} answered {self.status_code}{run}: {excerpt(said).rstrip('.')}. {self.advice}"


class AuthenticationError(CrewAPIError):
    """401 or 403: the token is missing, wrong or not allowed. Nothing was started by that request."""

    advice = (
        "Check the bearer token: it stands on the Status tab of the crew's page, and every crew has its own. A User "
        "Bearer Token may do less than the organisation's Bearer Token. Then store it: prefect-crew save NAME --url "
        "URL."
    )


class NotFoundError(CrewAPIError):
    """404: no crew at this URL, or no run with this id."""

    advice = "Check the crew's URL and the id of the run."


class InvalidInputsError(CrewAPIError):
    """The inputs do not fit the crew. Nothing was started.

    Attributes:
        missing_inputs: Names of the required inputs that were not given; empty if the server did not say.
        unknown_inputs: Names that were given and that the crew does not name in `known_inputs`. Only ever found before
            the kickoff.
        before_kickoff: Whether no kickoff was sent.
    """

    advice = "Nothing was started. prefect-crew inputs CREW lists what the crew takes."

    def __init__(
        self,
        *,
        missing_inputs: Sequence[str] = (),
        unknown_inputs: Sequence[str] = (),
        known_inputs: Sequence[str] = (),
        status_code: int = 422,
        method: str = "POST",
        path: str = "/kickoff",
        title: str | None = None,
        message: str | None = None,
        body: str = "",
        kickoff_id: str | None = None,
        before_kickoff: bool = False,
    ) -> None:
        self.missing_inputs = list(missing_inputs)
        self.unknown_inputs = list(unknown_inputs)
        self.known_inputs = list(known_inputs)
        self.before_kickoff = before_kickoff
        super().__init__(
            status_code=status_code,
            method=method,
            path=path,
            title=title,
            message=message,
            body=body,
            kickoff_id=kickoff_id,
        )

    def _text(self) -> str:
        missing = listed_names(self.missing_inputs)
        if not self.before_kickoff:
            return f"{super()._text()}{f' Missing: {missing}.' if missing else ''}"
        text = f"Missing inputs: {missing}. " if missing else ""
        if self.unknown_inputs:
            unknown = with_guesses(self.unknown_inputs, self.known_inputs)
            text += f"Unknown inputs: {unknown}. The crew takes: {listed_names(self.known_inputs)}. "
        extra = " To send them all the same: allow_extra_inputs=True on the block, or --allow-extra."
        return f"{text}{self.advice}{extra if self.unknown_inputs else ''}"


class RateLimitedError(CrewAPIError):
    """429: too many requests.

    Attributes:
        retry_after: Seconds that the server asks to wait, or None.
    """

    advice = "Nothing was started by it; try again later, or lower the rate."

    def __init__(self, *, retry_after: float | None = None, **facts: Any) -> None:
        self.retry_after = retry_after
        super().__init__(**facts)


class ServerError(CrewAPIError):
    """5xx: the crew's server is at fault.

    Attributes:
        retry_after: Seconds that the server asks to wait, or None.
    """

    advice = "Ask the crew's operators (CrewAI's support for a hosted crew), and give them this whole message."

    def __init__(self, *, retry_after: float | None = None, **facts: Any) -> None:
        self.retry_after = retry_after
        super().__init__(**facts)


class PrefectAwayError(CrewError):
    """The Prefect API does not answer, or there is none."""


class CrewConnectionError(CrewError):
    """No answer came: refused, reset, timed out, or a name or certificate that did not check out.

    Attributes:
        sent: Whether the request may have reached the server. False only where it surely did not.
    """

    def __init__(
        self,
        *,
        method: str,
        url: str,
        reason: str,
        sent: bool,
        kickoff_id: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.method = method
        self.url = url
        self.reason = reason
        self.sent = sent
        self.kickoff_id = kickoff_id
        run = f" (run {kickoff_id})" if kickoff_id else ""
        advice = advice or "Check that the crew's server is up and reachable from here: prefect-crew doctor CREW."
        super().__init__(f"{method} {url} got no answer{run}: {reason.rstrip('.')}. {advice}")


class ResponseFormatError(CrewError):
    """The server answered with something that is none of the known shapes.

    Attributes:
        body: An excerpt of the answer, at most 500 characters.
        status_code: The HTTP status of the answer, None if the parser was given only a body.
    """

    def __init__(
        self, *, expected: str, body: str, status_code: int | None = None, kickoff_id: str | None = None
    ) -> None:
        self.expected = expected
        self.body = excerpt(body)
        self.status_code = status_code
        self.kickoff_id = kickoff_id
        run = f" for run {kickoff_id}" if kickoff_id else ""
        super().__init__(
            f"Expected {expected}{run}, got: {self.body or 'an empty body'}. "
            "Check that the URL is the crew's own, not that of a page or a proxy before it."
        )


class OutputTypeError(CrewError):
    """The run completed, and its result does not fit the type that was asked for. The result is paid for and kept.

    Attributes:
        kickoff_id: The run.
        output: Its whole text.
        problems: What did not fit, a line each.
    """

    def __init__(
        self, *, kickoff_id: str, output_type: str, output: str, problems: Sequence[str], shown: str | None = None
    ) -> None:
        # `shown` is the text as the message may hold it; that becomes the state of a flow run, for all to read.
        self.kickoff_id = kickoff_id
        self.output_type = output_type
        self.output = output
        self.problems = list(problems)
        super().__init__(
            f"The result of run {kickoff_id} does not fit {output_type}: {'; '.join(self.problems)}. "
            f"The text: {excerpt(output if shown is None else shown) or 'empty'}. Nothing has to be bought again: mend "
            "the type, or leave output_type out, and run again with the same key."
        )


class AnsweredError(CrewError):
    """A question has its answer already, or is being answered at this moment. Nothing was sent."""


class KickoffUncertainError(CrewError):
    """A kickoff was sent and nobody knows whether it started a run. It is not sent again on a guess.

    Attributes:
        idempotency_key: The run that it was for.
        reason: Why nobody knows.
        sent: What was sent: crew, time, digest of the inputs.
    """

    def __init__(self, *, idempotency_key: str, reason: str, sent: Mapping[str, str] | None = None) -> None:
        self.idempotency_key = idempotency_key
        self.reason = reason
        self.sent = dict(sent or {})
        facts = ", ".join(f"{key} {value}" for key, value in self.sent.items())
        super().__init__(
            f"The kickoff of run {idempotency_key!r} is uncertain: {reason.rstrip('.')}. "
            f"{f'Sent: {facts}. ' if facts else ''}"
            "It may be running and is not started again. Look at the crew's page, then say which it was: "
            f"prefect-crew runs resolve {shlex.quote(idempotency_key)} --kickoff-id ID, or --never-started; "
            "then run again with the same key."
        )


class IdempotencyConflictError(CrewError):
    """The idempotency key belongs to a run of another crew or with other inputs. Nothing was started."""

    def __init__(self, *, idempotency_key: str, difference: str, kickoff_id: str | None = None) -> None:
        self.idempotency_key = idempotency_key
        self.difference = difference
        self.kickoff_id = kickoff_id
        super().__init__(
            f"Idempotency key {idempotency_key!r} belongs to another run: {difference}. Nothing was started. "
            f"Use another key, or look at that run: prefect-crew runs show {shlex.quote(idempotency_key)}."
        )


class _EndedError(CrewError):
    """What the errors about one run share."""

    def __init__(
        self, text: str, *, kickoff_id: str, crew: str | None = None, idempotency_key: str | None = None
    ) -> None:
        self.kickoff_id = kickoff_id
        self.crew = crew
        self.idempotency_key = idempotency_key
        super().__init__(text)


def _of(kickoff_id: str, crew: str | None) -> str:
    return f"Run {kickoff_id} of crew {crew}" if crew else f"Crew run {kickoff_id}"


class CrewFailedError(_EndedError):
    """The crew ran and failed. Attributes: kickoff_id, crew, idempotency_key, error (the crew's own)."""

    advice = "Correct the crew, then run again with the same key, which starts another."

    def __init__(
        self,
        *,
        kickoff_id: str,
        error: str,
        crew: str | None = None,
        idempotency_key: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.error = error
        super().__init__(
            f"{_of(kickoff_id, crew)} failed: {excerpt(error).rstrip('.') or 'the crew gave no reason'}. "
            f"{advice or self.advice}",
            kickoff_id=kickoff_id,
            crew=crew,
            idempotency_key=idempotency_key,
        )


class CrewStoppedError(_EndedError):
    """The run was stopped, by us or by someone else. Attributes: kickoff_id, crew, idempotency_key."""

    def __init__(
        self, *, kickoff_id: str, crew: str | None = None, idempotency_key: str | None = None, advice: str | None = None
    ) -> None:
        super().__init__(
            f"{_of(kickoff_id, crew)} was stopped before it had a result. {advice or 'Run again to buy a new one.'}",
            kickoff_id=kickoff_id,
            crew=crew,
            idempotency_key=idempotency_key,
        )


class CrewLostError(_EndedError):
    """The server does not know the run (any more).

    Attributes: kickoff_id, crew, idempotency_key, last_state. `last_state` is "completed" where only the result is
        lost.
    """

    def __init__(
        self,
        *,
        kickoff_id: str,
        crew: str | None = None,
        idempotency_key: str | None = None,
        last_state: str | None = None,
    ) -> None:
        self.last_state = last_state
        seen = f"it was last seen {last_state}" if last_state else "this wait for it has never seen it"
        again = "force_new=True (--force-new) buys another"
        if last_state == CrewState.COMPLETED:
            seen = "it has completed, but its record does not hold the result, which the server has forgotten"
        elif idempotency_key:
            again += f", and so does the key after prefect-crew runs resolve {shlex.quote(idempotency_key)} --lost"
        super().__init__(
            f"{_of(kickoff_id, crew)} is not known to the server: {seen}. "
            f"Check the URL, then the crew's page. It is not bought again on a guess: {again}.",
            kickoff_id=kickoff_id,
            crew=crew,
            idempotency_key=idempotency_key,
        )


class CrewTimeoutError(_EndedError):
    """A time budget ended while the crew had not. The crew may run on.

    Attributes:
        phase: "pending", "running" or "human": which budget ended.
        budget: That budget, in seconds.
        last_state: The state last seen.
        stopped: Whether the crew was stopped (`on_timeout="stop"`).
    """

    def __init__(
        self,
        *,
        kickoff_id: str,
        phase: str,
        budget: float,
        last_state: str | None,
        crew: str | None = None,
        idempotency_key: str | None = None,
        stopped: bool = False,
    ) -> None:
        self.phase = phase
        self.budget = budget
        self.last_state = last_state
        self.stopped = stopped
        after = "It was stopped." if stopped else "It was left running."
        if idempotency_key is None:
            go_on = "Look"
        elif stopped:
            go_on = f"Idempotency key {idempotency_key!r} buys another, which may want a larger timeout; or look"
        else:
            go_on = (
                f"To go on waiting, run again with idempotency key {idempotency_key!r} and a larger timeout, or look"
            )
        super().__init__(
            f"{_of(kickoff_id, crew)} was still {last_state or 'unseen'} "
            f"when its {phase} time of {budget:g} s was over. {after} {go_on}: "
            f"prefect-crew status CREW {shlex.quote(kickoff_id)}.",
            kickoff_id=kickoff_id,
            crew=crew,
            idempotency_key=idempotency_key,
        )


class ReviewLimitError(_EndedError):
    """A task asked for a person's answer more often than the policy's `max_rounds`. The crew may wait on.

    Attributes:
        task_id: The task.
        max_rounds: How often it may ask.
        stopped: Whether the crew was stopped (`on_human_timeout="stop"`).
    """

    def __init__(
        self,
        *,
        kickoff_id: str,
        task_id: str,
        max_rounds: int,
        crew: str | None = None,
        idempotency_key: str | None = None,
        stopped: bool = False,
    ) -> None:
        self.task_id = task_id
        self.max_rounds = max_rounds
        self.stopped = stopped
        after = "It was stopped." if stopped else "It still waits: answer it on the crew's page, or stop it there."
        super().__init__(
            f"{_of(kickoff_id, crew)} asks once more for a person's answer to task {excerpt(task_id, 100)}, "
            f"beyond its limit of {max_rounds} rounds. {after}",
            kickoff_id=kickoff_id,
            crew=crew,
            idempotency_key=idempotency_key,
        )


class PipelineFailedError(CrewError):
    """At least one step of a pipeline failed; the independent ones were finished.

    Attributes:
        failed: Names of the steps that failed.
        skipped: Names of the steps that did not run because they needed one that failed.
        results: Results so far, by step name.
        errors: The error of each failed step, by step name.
    """

    def __init__(
        self,
        *,
        failed: Sequence[str],
        results: Mapping[str, Any],
        errors: Mapping[str, BaseException],
        skipped: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> None:
        self.failed = list(failed)
        self.skipped = list(skipped)
        self.results = dict(results)
        self.errors = dict(errors)
        self.idempotency_key = idempotency_key
        why = "; ".join(f"{name}: {excerpt(str(errors[name])).rstrip('.')}" for name in self.failed if name in errors)
        not_run = f" Not run because of it: {', '.join(self.skipped)}." if self.skipped else ""
        again = f" with idempotency key {idempotency_key!r}" if idempotency_key else ""
        super().__init__(
            f"{'A step' if len(self.failed) == 1 else f'{len(self.failed)} steps'} failed: {why}.{not_run} "
            f"{len(self.results)} finished and are kept: retry the flow run, or run again{again}, "
            "to start with what failed."
        )


SHOWN = 20
"""Reasons that a message lists, and columns."""
LINES = 10
"""Lines that a message names for each reason."""


class BatchFailedError(CrewError):
    """A batch did not come to a full end. Attributes: report."""

    def __init__(self, report: Any) -> None:
        self.report = report
        advice = "The same call goes on with what is left; failed rows are bought again with retry_failed=True."
        super().__init__(f"{str(report).rstrip('.')}. {advice}")


class BatchCancelledError(CrewError):
    """The flow run of a batch was cancelled. Attributes: name."""

    def __init__(self, *, name: str) -> None:
        self.name = name
        super().__init__(f"Batch {name!r} was cancelled. The same call goes on where it stopped.")


class BatchBusyError(CrewError):
    """Another process works on the batch at this moment. Attributes: name."""

    def __init__(self, *, name: str, what: str = "") -> None:
        self.name = name
        super().__init__(
            f"{what or f'Batch {name!r}'} is being run by another process at this moment. Nothing was started or "
            "changed here. Wait for it, or end it; then do the same again."
        )


class BatchChangedError(CrewError):
    """The rows or the crew are not those that the batch was begun with. Attributes: name, difference."""

    def __init__(self, *, name: str, difference: str) -> None:
        self.name = name
        self.difference = difference
        super().__init__(
            f"Batch {name!r} was begun with something else: {difference}. Nothing was started. To run what is new and "
            "keep what is done, say on_change='continue'; for a new purchase of everything choose another name."
        )


class DatasetError(CrewError):
    """A data set cannot be read. Attributes: source (its name), line (1-based, None where there is none), reason."""

    def __init__(self, reason: str, *, source: str, line: int | None = None) -> None:
        self.reason = reason
        self.source = source
        self.line = line
        where = source if line is None else f"{source}, line {line}"
        super().__init__(f"{where}: {reason} Nothing of this data set was started.")


class BadRowsError(DatasetError):
    """Rows of a data set cannot be run. Attributes: rows (all of them, up to 1,000), count."""

    def __init__(self, rows: Sequence[Any], count: int, *, source: str, alone: bool = False) -> None:
        self.rows = list(rows)
        self.count = count
        cannot = "a row cannot be run" if count == 1 else f"{count:,} rows cannot be run"
        what = f"{cannot}{', which are all' if alone else ''}: {listed_rows(self.rows, count)}."
        advice = "" if alone else " Correct them, or set them aside with on_bad_row='set-aside'."
        super().__init__(f"{what}{advice}", source=source)


def by_reason(rows: Sequence[Any], count: int) -> tuple[list[tuple[str, str]], int]:
    """Return where and why rows cannot be run, a reason at a time, and how many more there are beside these.

    Args:
        rows: The rows that are kept.
        count: How many there are in all.
    """
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row.line)
    found: list[tuple[str, str]] = []
    more = count
    for reason, lines in list(groups.items())[:SHOWN]:
        most = count if len(groups) == 1 else len(lines)
        found.append((_lines(lines[:LINES], most - len(lines[:LINES])), reason))
        more -= most
    return found, more


def listed_rows(rows: Sequence[Any], count: int) -> str:
    """Return where and why rows cannot be run, as one text."""
    found, more = by_reason(rows, count)
    return "; ".join([f"{where}: {reason}" for where, reason in found] + ([f"and {more:,} more rows"] if more else []))


def _lines(lines: Sequence[int], more: int) -> str:
    words = [str(line) for line in lines] + ([f"{more:,} more"] if more else [])
    if len(words) == 1:
        return f"line {words[0]}"
    return f"lines {', '.join(words[:-1])} and {words[-1]}"


class LedgerError(CrewError):
    """The ledger cannot be used. Attributes: ledger (its address without a password)."""

    def __init__(self, reason: str, *, ledger: str, advice: str | None = None) -> None:
        self.ledger = ledger
        if advice is None:
            advice = (
                "No row is kicked off without it; mend it and run the batch again with the same name, which goes on "
                "where it stopped."
            )
        super().__init__(f"The ledger {ledger} {reason} {advice}")


class LedgerMissingError(CrewError):
    """The batch is kept in another ledger than the one at hand. Attributes: name, ledger (where it is kept)."""

    def __init__(self, *, name: str, ledger: str) -> None:
        self.name = name
        self.ledger = ledger
        super().__init__(
            f"Batch {name!r} is kept in another ledger, {ledger}, which is not the one here. Going on without it would "
            "buy every row again, so nothing was started. Give that ledger (ledger=…), or choose another name."
        )


class OutputError(CrewError):
    """The output cannot be written. What has ended is in the ledger: run the batch again with the same name."""
