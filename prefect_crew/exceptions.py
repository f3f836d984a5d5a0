"""Every error that this package raises on purpose.

    CrewError
    ├── ConfigurationError           a URL, token, id, input, option or call that cannot be used; also a ValueError
    ├── CrewAPIError                 the crew's server answered with an error: `status_code`
    │   ├── AuthenticationError      401, 403
    │   └── InvalidInputsError       400, 422, and before any kickoff
    ├── CrewConnectionError          no answer: refused, reset, timed out, DNS, TLS
    ├── ResponseFormatError          an answer in no known format
    ├── OutputTypeError              a completed run whose result does not fit the `output_type`
    ├── NoResultError                there is no such run, or it has no result
    ├── NotStartedError              the kickoff could not be sent in time; nothing was started
    ├── KickoffUncertainError        the kickoff may or may not have started a run
    ├── IdempotencyConflictError     the idempotency key belongs to another crew or other inputs
    ├── SessionBlockedError          an earlier turn of the session is not over, and nobody may know its end
    ├── BudgetExceededError          a budget has no room for another run
    ├── NotWaitingError              the run does not wait for a person, or not for this answer
    ├── AnswerUncertainError         an answer was sent, and nobody knows whether it arrived
    ├── FlowRunCancelledError        the flow run was cancelled, so it starts no run and waits for none
    ├── CrewFailedError              the crew ran and failed
    ├── CrewStoppedError             the run was stopped
    ├── CrewLostError                the server no longer knows the run
    ├── CrewTimeoutError             a time limit is over; the crew may run on
    ├── PipelineFailedError          at least one step of a pipeline failed
    ├── BatchFailedError             not every row of a batch completed
    ├── BatchBusyError               another process works on the batch
    ├── DatasetError                 a data set cannot be read, or rows of it cannot be run
    ├── StoreError                   the crew database cannot be used
    └── PrefectAwayError             the Prefect API does not answer, or refuses a request

A message says what happened, to which run, and what to do next. Facts that a program may need are attributes too. All
errors survive pickling, since Prefect stores exceptions that way.
"""

from __future__ import annotations

import copyreg
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from prefect_crew._text import excerpt, plain
from prefect_crew.states import CrewState

__all__ = [
    "AnswerUncertainError", "AuthenticationError", "BatchBusyError", "BatchFailedError", "BudgetExceededError",
    "ConfigurationError", "CrewAPIError", "CrewConnectionError", "CrewError", "CrewFailedError", "CrewLostError",
    "CrewStoppedError", "CrewTimeoutError", "DatasetError", "FlowRunCancelledError", "IdempotencyConflictError",
    "InvalidInputsError", "KickoffUncertainError", "NoResultError", "NotStartedError", "NotWaitingError",
    "OutputTypeError", "PipelineFailedError", "PrefectAwayError", "ResponseFormatError", "SessionBlockedError",
    "StoreError",
]  # fmt: skip


class CrewError(Exception):
    """Root of all errors of this package: a message, and facts as attributes. A fact that is not known is None."""

    idempotency_key: str | None = None
    kickoff_id: str | None = None
    crew: str | None = None

    def __init__(self, text: str, /, **facts: Any) -> None:
        # Most errors quote the crew, and are printed to terminals and logs by others than us.
        super().__init__(plain(text))
        vars(self).update(facts)

    def add(self, text: str) -> None:
        """Append a sentence to the message."""
        self.args = (plain(f"{self} {text}"),)

    def about(self, idempotency_key: str, crew: str) -> None:
        """Set the idempotency key, and name the key in the message unless the message names it already."""
        self.idempotency_key = idempotency_key
        if idempotency_key not in str(self):
            self.add(f"Crew {crew}, idempotency key {idempotency_key!r}.")

    def __reduce__(self) -> Any:
        # Some subclasses take keyword arguments, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigurationError(CrewError, ValueError):
    """A URL, token, id, input or option cannot be used, or a function was called where it cannot be. Nothing was
    sent."""


class CrewAPIError(CrewError):
    """The crew's server answered with an error.

    `message` is the server's, `body` an excerpt of the answer, `retry_after` the seconds of its header
    `Retry-After`, or None.
    """

    status_code: int = 0
    message: str | None = None
    body: str = ""
    retry_after: float | None = None


class AuthenticationError(CrewAPIError):
    """401 or 403: the token is missing, wrong or not allowed. That request started nothing."""


class InvalidInputsError(CrewAPIError):
    """The inputs do not fit the crew. Nothing was started.

    `missing_inputs` are the missing required inputs, if the server names them. If `before_kickoff` is True, no kickoff
    was sent, and `unknown_inputs` are the inputs that the crew does not take.
    """

    missing_inputs: Sequence[str] = ()
    unknown_inputs: Sequence[str] = ()
    before_kickoff: bool = False


class CrewConnectionError(CrewError):
    """No answer came: the connection was refused, reset or timed out, or its name or certificate is not valid.

    `sent` says whether the request may have reached the server; it is False only if it surely did not.
    """

    reason: str = ""
    sent: bool = True


class ResponseFormatError(CrewError):
    """The server answered in no known format. `body` is an excerpt of the answer, at most 500 characters."""

    body: str = ""
    status_code: int | None = None


class OutputTypeError(CrewError):
    """The run completed, and its result does not fit the `output_type`. The result stays on record.

    `problems` has one line for each misfit, `output` is the whole text.
    """

    output: str = ""
    problems: Sequence[str] = ()


class KickoffUncertainError(CrewError):
    """A kickoff was sent, and nobody knows whether it started a run. It is never sent again on a guess."""


class NoResultError(CrewError):
    """No run has this idempotency key or kickoff id, or it has no result: it has not ended, or never began."""


class NotStartedError(CrewError):
    """The time to send the kickoff was over before its first byte. Nothing was started; Prefect retries the task."""


class NotWaitingError(CrewError):
    """The run does not wait for a person, or not for this answer: the question has one, or is no longer open. Nothing
    was sent, or the platform refused it."""


class AnswerUncertainError(CrewError):
    """A person's answer was sent, and nobody knows whether it arrived. It is not sent again automatically."""


class FlowRunCancelledError(CrewError):
    """The flow run was cancelled, so it starts no run and waits for none; or the batch was."""


class IdempotencyConflictError(CrewError):
    """The idempotency key belongs to a run of another crew or with other inputs. Nothing was started."""


class SessionBlockedError(CrewError):
    """A session cannot go on after an earlier turn. Nothing was started."""


class BudgetExceededError(CrewError):
    """A budget has no room for another run. Nothing was started.

    `measure` is "cost", "tokens" or "kickoffs". `used` includes the estimates of runs in flight; `estimate` is the
    expected use of another run. `resets_at` is the start of the next day or month, UTC; None for a batch. `counter`
    names the sum.
    """

    budget: str = ""
    counter: str = ""
    measure: str = ""
    used: float = 0
    limit: float = 0
    estimate: float = 0
    resets_at: datetime | None = None


class CrewFailedError(CrewError):
    """The crew ran and failed. `error` is the crew's own; `advice` replaces the usual advice."""

    def __init__(self, *, error: str, advice: str | None = None, **names: Any) -> None:
        reason = excerpt(error).rstrip(".") or "the crew gave no reason"
        advice = advice or "Correct the crew, then run again with the same key, which starts another run."
        super().__init__(f"{_named(names)} failed: {reason}. {advice}", error=error, **names)
        self.error = error


class CrewStoppedError(CrewError):
    """The run was stopped, by us or by someone else. `advice` replaces the usual advice."""

    def __init__(self, *, advice: str | None = None, **names: Any) -> None:
        text = f"{_named(names)} was stopped before it had a result. {advice or 'Run again to start another.'}"
        super().__init__(text, **names)


class CrewLostError(CrewError):
    """The server does not know the run (any more). `last_state` is "completed" if only the result is lost."""

    def __init__(self, *, last_state: str | None = None, **names: Any) -> None:
        again = "force_new=True (--force-new) starts another"
        if last_state == CrewState.COMPLETED:
            sight = "it has completed, but the server has forgotten the result, which the crew database does not hold"
        else:
            if key := names.get("idempotency_key"):
                again += f", and so does the key after prefect-crew runs resolve {shlex.quote(key)} --lost"
            sight = f"it was last seen {last_state}" if last_state else "this call got no status of the run"
            sight += (
                ". A hosted crew that waits for a person looks the same: with webhooks to a receiver its question "
                "arrives, and the same call then finds it"
            )
        super().__init__(
            f"{_named(names)} is not known to the server: {sight}. Check the URL, then the crew's page. The run is "
            f"not started again automatically: {again}.",
            **names,
        )
        self.last_state = last_state


class CrewTimeoutError(CrewError):
    """A time limit ended before the crew did. The crew may run on, unless it was `stopped`.

    `phase` is the limit that ended: "pending", "running", "human", or "rounds" if a task asked a person too often;
    `limit` is the limit in seconds.
    """

    phase: str = ""
    limit: float | None = None
    last_state: str | None = None
    stopped: bool = False


class PipelineFailedError(CrewError):
    """At least one step of a pipeline failed; independent steps were finished.

    `failed` and `skipped` are names of steps: a skipped step needed a failed one. `results` and `errors` are by the
    step's name; `idempotency_key` is the pipeline's key.
    """

    failed: Sequence[str] = ()
    skipped: Sequence[str] = ()
    results: Mapping[str, Any] = {}
    errors: Mapping[str, BaseException] = {}


class BatchFailedError(CrewError):
    """Not every row of a batch completed; `report` has the rows' counts."""

    report: Any = None


class BatchBusyError(CrewError):
    """Another process works on batch `name` at this moment."""

    def __init__(self, *, name: str) -> None:
        super().__init__(
            f"Batch {name!r} is being run by another process at this moment. Nothing was started or changed here. Wait "
            "for that process or stop it, then repeat this call.",
            name=name,
        )


class DatasetError(CrewError):
    """A data set cannot be read, or rows of it cannot be run: up to 1,000 of these are in `rows`.

    `source` is its name, `line` the number of the line from 1, or None. `begun`: whether this call may have started
    rows of it before the error.
    """

    def __init__(
        self, reason: str, *, source: str, line: int | None = None, begun: bool = False, rows: Sequence[Any] = ()
    ) -> None:
        where = source if line is None else f"{source}, line {line}"
        started = "The rows that were started are in the crew database." if begun else ""
        super().__init__(f"{where}: {reason} {started or 'Nothing of this data set was started.'}")
        self.reason, self.source, self.line, self.begun, self.rows = reason, source, line, begun, rows


class StoreError(CrewError):
    """The crew database cannot be used.

    `operation` is the function of the store that failed, and `started` whether a run was started: "yes", "no" or
    "unknown".
    """

    operation: str = ""
    started: str = "unknown"


class PrefectAwayError(CrewError):
    """The Prefect API does not answer, no API is set, or it refuses a request, such as one with a wrong API key."""


def _named(names: Mapping[str, Any]) -> str:
    kickoff_id, crew = names.get("kickoff_id"), names.get("crew")
    return f"Run {kickoff_id} of crew {crew}" if crew else f"Crew run {kickoff_id}"
