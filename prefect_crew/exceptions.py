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
    ├── ResponseFormatError          an answer in no known format
    ├── OutputTypeError              a completed run whose result does not fit the `output_type`
    ├── RunNotFoundError             no run has this idempotency key or kickoff id
    ├── NoResultError                the run has no result: it has not ended, or never began
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
    ├── ReviewLimitError             a task asked for a person's answer too often
    ├── PipelineFailedError          at least one step of a pipeline failed
    ├── BatchFailedError             not every row of a batch completed
    ├── BatchCancelledError          the flow run of a batch was cancelled
    ├── BatchBusyError               another process works on the batch
    ├── DatasetError                 a data set cannot be read
    │   └── BadRowsError             rows of it cannot be run
    ├── ExportError                  the export of a batch cannot be written
    ├── StoreError                   the crew database cannot be used
    ├── PrefectAwayError             the Prefect API does not answer
    └── PrefectRefusedError          the Prefect API refuses a request, for example for a wrong PREFECT_API_KEY

A message says what happened, to which run, and what to do next. The same facts are attributes, which are also the
keyword arguments of the class. All errors survive pickling, since Prefect stores exceptions that way.
"""

from __future__ import annotations

import copyreg
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, dataclass_transform

from prefect_crew._text import excerpt, listed_names, listed_rows, plain, with_guesses
from prefect_crew.states import CrewState

__all__ = [
    "AnswerUncertainError", "AuthenticationError", "BadRowsError", "BatchBusyError",
    "BatchCancelledError", "BatchFailedError", "BudgetExceededError", "ConfigurationError",
    "CrewAPIError", "CrewConnectionError", "CrewError", "CrewFailedError", "CrewLostError", "CrewStoppedError",
    "CrewTimeoutError", "DatasetError", "ExportError", "FlowRunCancelledError", "IdempotencyConflictError",
    "InvalidCallError", "InvalidInputsError", "KickoffUncertainError", "NoResultError", "NotFoundError",
    "NotStartedError", "NotWaitingError", "OutputTypeError", "PipelineFailedError", "PrefectAwayError",
    "PrefectRefusedError", "RateLimitedError", "ResponseFormatError", "ReviewLimitError", "RunNotFoundError",
    "ServerError", "SessionBlockedError", "StoreError",
]  # fmt: skip


class CrewError(Exception):
    """Root of all errors of this package. `idempotency_key` is the key of the run, None if the run has none."""

    idempotency_key: str | None = None

    def __init__(self, *args: object) -> None:
        # Most errors quote the crew, and are printed to terminals and logs by others than us.
        super().__init__(*(plain(part) if isinstance(part, str) else part for part in args))

    def add(self, text: str) -> None:
        """Append a sentence to the message."""
        CrewError.__init__(self, f"{self} {text}")

    def about(self, idempotency_key: str, crew: str) -> None:
        """Set the idempotency key, and name the key in the message unless the message names it already."""
        self.idempotency_key = idempotency_key
        if idempotency_key not in str(self):
            self.add(f"Crew {crew}, idempotency key {idempotency_key!r}.")

    def __reduce__(self) -> Any:
        # Most subclasses take keyword arguments, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class _FactsError(CrewError):
    """An error whose annotated attributes are its keyword arguments. `_text` makes the message from them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(eq=False, repr=False, kw_only=True)(cls)

    def __post_init__(self) -> None:
        CrewError.__init__(self, self._text())

    def _text(self) -> str:
        raise NotImplementedError


class ConfigurationError(CrewError, ValueError):
    """A URL, token, id, input or option cannot be used. Nothing was sent."""


class InvalidCallError(CrewError, RuntimeError):
    """A function or an object cannot be used in this place or at this time. The calling code has a mistake."""


class CrewAPIError(_FactsError):
    """The crew's server answered with an error.

    `message` is the server's message, `body` an excerpt of the answer, `kickoff_id` the run of the request, and
    `retry_after` the seconds of the header `Retry-After`, or None.
    """

    advice: ClassVar[str] = "See the crew's page and the answer above."

    status_code: int
    method: str
    path: str
    message: str | None = None
    body: str = ""
    kickoff_id: str | None = None
    retry_after: float | None = None

    def __post_init__(self) -> None:
        self.body = excerpt(self.body)
        super().__post_init__()

    def _text(self) -> str:
        words = _clause(self.message or self.body) or "an empty body"
        return f"{self.method} {self.path} answered {self.status_code}{_of(self.kickoff_id)}: {words}. {self.advice}"


class AuthenticationError(CrewAPIError):
    """401 or 403: the token is missing, wrong or not allowed. That request started nothing."""

    advice: ClassVar[str] = (
        "Check the bearer token on the Status tab of the crew's page. Each crew has its own, and a User Bearer Token "
        "may do less than the organisation's. To renew a stored crew's token: prefect-crew crews save NAME --overwrite."
    )


class NotFoundError(CrewAPIError):
    """404: no crew at this URL, or no run with this id."""

    advice: ClassVar[str] = "Check the crew's URL, and the id of the run if it names one."


class InvalidInputsError(CrewAPIError):
    """The inputs do not fit the crew. Nothing was started.

    `missing_inputs` are the missing required inputs, if the server names them. If `before_kickoff` is True, no kickoff
    was sent, and `known_inputs` are the inputs that the crew takes, `unknown_inputs` the inputs that it does not take.
    """

    advice: ClassVar[str] = "Nothing was started. To list the crew's inputs, run: prefect-crew inputs CREW."

    missing_inputs: Sequence[str] = ()
    unknown_inputs: Sequence[str] = ()
    known_inputs: Sequence[str] = ()
    status_code: int = 422
    method: str = "POST"
    path: str = "/kickoff"
    before_kickoff: bool = False

    def _text(self) -> str:
        missing = f"Missing inputs: {listed_names(self.missing_inputs)}. " if self.missing_inputs else ""
        if not self.before_kickoff:
            return f"{super()._text()} {missing}".rstrip()
        if self.missing_inputs:
            missing += "A Flow needs none of its inputs: save it with --flow, or DeployedCrew(flow=True). "
        if not self.unknown_inputs:
            return f"{missing}{self.advice}"
        unknown = with_guesses(self.unknown_inputs, self.known_inputs)
        return (
            f"{missing}Unknown inputs: {unknown}. The crew takes: {listed_names(self.known_inputs)}. {self.advice} "
            "To send the unknown inputs anyway, set allow_extra_inputs=True on the block."
        )


class RateLimitedError(CrewAPIError):
    """429: too many requests."""

    advice: ClassVar[str] = "No run was started. Try again later, or lower the rate."


class ServerError(CrewAPIError):
    """5xx: the crew's server is at fault."""

    advice: ClassVar[str] = (
        "This is often temporary. Run again with the same idempotency key, which starts no second run. If it lasts, "
        "ask the crew's operators (CrewAI's support for a hosted crew), and give them this whole message."
    )


class CrewConnectionError(_FactsError):
    """No answer came: the connection was refused, reset or timed out, or its name or certificate is not valid.

    `sent` says whether the request may have reached the server; it is False only if it surely did not.
    """

    method: str
    url: str
    reason: str
    sent: bool
    kickoff_id: str | None = None

    def _text(self) -> str:
        return (
            f"{self.method} {self.url} got no answer{_of(self.kickoff_id)}: {self.reason.rstrip('.')}. "
            "To check that the crew's server can be reached from here, run: prefect-crew doctor CREW."
        )


class ResponseFormatError(_FactsError):
    """The server answered in no known format. `body` is an excerpt of the answer, at most 500 characters."""

    expected: str
    body: str
    status_code: int | None = None
    kickoff_id: str | None = None

    def __post_init__(self) -> None:
        self.body = excerpt(self.body)
        super().__post_init__()

    def _text(self) -> str:
        return (
            f"Expected {self.expected}{_of(self.kickoff_id)}, got: {self.body or 'an empty body'}. "
            "Check that the URL is the crew's own, not the URL of a web page or a proxy."
        )


class OutputTypeError(_FactsError):
    """The run completed, and its result does not fit the `output_type`. The result stays on record.

    `problems` has one line for each misfit. `output` is the whole text, `shown` the masked text for the message: the
    message becomes the state of a flow run, which everybody can read.
    """

    kickoff_id: str
    output_type: str
    output: str
    problems: Sequence[str]
    shown: str | None = None

    def _text(self) -> str:
        text = excerpt(self.output if self.shown is None else self.shown) or "empty"
        return (
            f"The result of run {self.kickoff_id} does not fit {self.output_type}: {'; '.join(self.problems)}. The "
            f"text: {text}. The result is on record. Correct the type, or leave output_type out, and run again with "
            "the same key, which starts no other run."
        )


class KickoffUncertainError(_FactsError):
    """A kickoff was sent, and nobody knows whether it started a run. It is never sent again on a guess.

    `reason` is the reason for the uncertainty. `sent` has facts of the kickoff: crew, time, digest of inputs, attempt.
    """

    idempotency_key: str  # pyright: ignore[reportIncompatibleVariableOverride]  # always there
    reason: str
    sent: Mapping[str, str] = field(default_factory=dict[str, str])

    def _text(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in self.sent.items())
        return (
            f"The kickoff of run {self.idempotency_key!r} is uncertain: {self.reason.rstrip('.')}. "
            f"{f'Sent: {facts}. ' if facts else ''}The run may go on and is not started again. Look at the crew's "
            f"page, then run: prefect-crew runs resolve {shlex.quote(self.idempotency_key)} "
            "--kickoff-id ID, or --never-started; then run again with the same key."
        )


class RunNotFoundError(CrewError):
    """No run on record has this idempotency key or kickoff id."""


class NoResultError(CrewError):
    """The run has no result: it has not ended, or never began."""


class NotStartedError(CrewError):
    """The time to send the kickoff was over before its first byte. Nothing was started; Prefect retries the task."""


class NotWaitingError(CrewError):
    """The run does not wait for a person, or not for this answer: the question has one, or is no longer open. Nothing
    was sent."""


class AnswerUncertainError(CrewError):
    """A person's answer was sent, and nobody knows whether it arrived. It is not sent again automatically."""


class FlowRunCancelledError(CrewError):
    """The flow run was cancelled, so it starts no run and waits for none."""


class IdempotencyConflictError(_FactsError):
    """The idempotency key belongs to run `kickoff_id` of another crew or with other inputs. Nothing was started."""

    idempotency_key: str  # pyright: ignore[reportIncompatibleVariableOverride]  # always there
    difference: str
    kickoff_id: str | None = None

    def _text(self) -> str:
        return (
            f"Idempotency key {self.idempotency_key!r} belongs to another run: {self.difference}. Nothing was started. "
            f"Use another key, or look at that run with prefect-crew runs inspect {shlex.quote(self.idempotency_key)}."
        )


class SessionBlockedError(_FactsError):
    """A session cannot go on after its turn `turn`. Nothing was started.

    `run` is the idempotency key of that turn, `reason` the reason, `advice` the next step of a person.
    """

    session: str
    turn: int
    run: str
    reason: str
    advice: str

    def _text(self) -> str:
        return (
            f"Session {self.session!r} cannot go on after turn {self.turn}: {self.reason.rstrip('.')}. Nothing was "
            f"started. {self.advice}"
        )


class BudgetExceededError(_FactsError):
    """A budget has no room for another run. Nothing was started.

    `measure` is "cost", "tokens" or "kickoffs". `used` includes the estimates of runs in flight; `estimate` is the
    expected use of another run. `resets_at` is the start of the next day or month, UTC; None for a batch. `counter`
    names the sum, and `row_of` the batch whose row had no room.
    """

    budget: str
    counter: str
    measure: str
    used: float
    limit: float
    estimate: float
    resets_at: datetime | None = None
    on_limit: str = "refuse"
    row_of: str | None = None

    def _text(self) -> str:
        when, then = "", f"Nothing was started. Raise max_{self.measure} and make the same call again."
        if self.resets_at:
            when = f". The budget begins again at {self.resets_at:%Y-%m-%d %H:%M} UTC"
            again = "Run again then with the same key"
            if self.row_of is not None:
                again = f"To go on then, run: prefect-crew batch resume {shlex.quote(self.row_of)}"
            then = f"Nothing was started. {again}, or raise max_{self.measure}."
        then = "The run starts anyway, since on_limit is 'warn'." if self.on_limit == "warn" else then
        return (
            f"Budget {self.budget!r} has no room for another run, which takes about {self.estimate:,.4g}: "
            f"{self.used:,.6g} of {self.limit:,.6g} {self.measure} are used, with the estimates of runs in "
            f"flight{when}. {then}"
        )


class _RunError(_FactsError):
    """The base of the errors about one run."""

    kickoff_id: str
    crew: str | None = None
    idempotency_key: str | None = None

    @property
    def _run(self) -> str:
        return f"Run {self.kickoff_id} of crew {self.crew}" if self.crew else f"Crew run {self.kickoff_id}"


class CrewFailedError(_RunError):
    """The crew ran and failed. `error` is the crew's own; `advice` replaces the usual advice."""

    error: str
    advice: str | None = None

    def _text(self) -> str:
        advice = self.advice or "Correct the crew, then run again with the same key, which starts another run."
        return f"{self._run} failed: {_clause(self.error) or 'the crew gave no reason'}. {advice}"


class CrewStoppedError(_RunError):
    """The run was stopped, by us or by someone else. `advice` replaces the usual advice."""

    advice: str | None = None

    def _text(self) -> str:
        return f"{self._run} was stopped before it had a result. {self.advice or 'Run again to start another.'}"


class CrewLostError(_RunError):
    """The server does not know the run (any more). `last_state` is "completed" if only the result is lost."""

    last_state: str | None = None

    def _text(self) -> str:
        again = "force_new=True (--force-new) starts another"
        if self.idempotency_key and self.last_state != CrewState.COMPLETED:
            key = shlex.quote(self.idempotency_key)
            again += f", and so does the key after prefect-crew runs resolve {key} --lost"
        if self.last_state == CrewState.COMPLETED:
            sight = "it has completed, but the server has forgotten the result, which the crew database does not hold"
        else:
            sight = f"it was last seen {self.last_state}" if self.last_state else "this call got no status of the run"
            sight += (
                ". A hosted crew that waits for a person looks the same: with webhooks to a receiver its question "
                "arrives, and the same call then finds it"
            )
        return (
            f"{self._run} is not known to the server: {sight}. Check the URL, then the crew's page. The run is "
            f"not started again automatically: {again}."
        )


class CrewTimeoutError(_RunError):
    """A time limit ended before the crew did. The crew may run on, unless it was `stopped`.

    `phase` is the limit that ended: "pending", "running" or "human"; `limit` is the limit in seconds.
    """

    phase: str
    limit: float
    last_state: str | None
    stopped: bool = False

    def _text(self) -> str:
        advice = "Look"
        if (key := self.idempotency_key) is not None:
            to_do = "start another" if self.stopped else "go on waiting"
            advice = f"To {to_do}, run again with idempotency key {key!r} and a larger timeout, or look"
        return (
            f"{self._run} was still {self.last_state or 'unseen'} after its {self.phase} time limit of "
            f"{self.limit:g} s. {'It was stopped' if self.stopped else 'It was left running'}. {advice}: "
            f"prefect-crew runs inspect {shlex.quote(self.kickoff_id)}."
        )


class ReviewLimitError(_RunError):
    """Task `task_id` asked for a person's answer more than `max_rounds` times. The crew waits on, unless `stopped`."""

    task_id: str
    max_rounds: int
    stopped: bool = False

    def _text(self) -> str:
        after = "It was stopped." if self.stopped else "It still waits. Answer it on the crew's page, or stop it there."
        return (
            f"{self._run}: task {excerpt(self.task_id, 100)} has asked a person more than {self.max_rounds} times "
            f"(max_rounds). {after}"
        )


class PipelineFailedError(_FactsError):
    """At least one step of a pipeline failed; independent steps were finished.

    `failed` and `skipped` are names of steps: a skipped step needed a failed one. `results` and `errors` are by the
    step's name; `idempotency_key` is the pipeline's key.
    """

    failed: Sequence[str]
    results: Mapping[str, Any]
    errors: Mapping[str, BaseException]
    skipped: Sequence[str] = ()
    idempotency_key: str | None = None

    def _text(self) -> str:
        why = "; ".join(f"{name}: {_clause(str(self.errors[name]))}" for name in self.failed if name in self.errors)
        not_run = f" Not run because of this: {', '.join(self.skipped)}." if self.skipped else ""
        again = f" with idempotency key {self.idempotency_key!r}" if self.idempotency_key else ""
        return (
            f"{'A step' if len(self.failed) == 1 else f'{len(self.failed)} steps'} failed: {why}.{not_run} Results "
            f"that are kept: {len(self.results)}. Retry the flow run, or run again{again}, to start the rest."
        )


class BatchFailedError(_FactsError):
    """Not every row of a batch completed; `report` has the rows' counts."""

    report: Any = field(kw_only=False)

    def _text(self) -> str:
        advice = "The same call goes on with the rows that are left, and starts failed ones again, up to max_attempts."
        return f"{str(self.report).rstrip('.')}. {advice}"


class BatchCancelledError(_FactsError):
    """The flow run of batch `name` was cancelled."""

    name: str

    def _text(self) -> str:
        return f"Batch {self.name!r} was cancelled. The same call continues where it stopped."


class BatchBusyError(_FactsError):
    """Another process works on batch `name` at this moment, or on a part of it, which `what` names."""

    name: str
    what: str = ""

    def _text(self) -> str:
        return (
            f"{self.what or f'Batch {self.name!r}'} is being run by another process at this moment. Nothing was "
            "started or changed here. Wait for that process or stop it, then repeat this call."
        )


class DatasetError(_FactsError):
    """A data set cannot be read. `source` is its name, `line` the number of the line from 1, or None.

    `begun`: whether this call may have started rows of it before the error.
    """

    reason: str = field(kw_only=False)
    source: str
    line: int | None = None
    begun: bool = False

    def _text(self) -> str:
        where = self.source if self.line is None else f"{self.source}, line {self.line}"
        consequence = (
            "The rows that were started are in the crew database."
            if self.begun
            else "Nothing of this data set was started."
        )
        return f"{where}: {self.reason} {consequence}"


class BadRowsError(DatasetError):
    """Rows of a data set cannot be run: `count` of them, up to 1,000 in `rows`. `alone`: no row can be run."""

    reason: str = field(init=False)
    rows: Sequence[Any] = field(kw_only=False)
    count: int = field(kw_only=False)
    alone: bool = False

    def __post_init__(self) -> None:
        cannot = "a row cannot be run" if self.count == 1 else f"{self.count:,} rows cannot be run"
        advice = "" if self.alone else " Correct them, or skip them with on_bad_row='skip' (--on-bad-row skip)."
        self.reason = f"{cannot}: {listed_rows(self.rows, self.count)}.{advice}"
        if self.alone:
            reasons = {row.reason for row in self.rows}
            why = reasons.pop() if len(reasons) == 1 else listed_rows(self.rows, self.count)
            self.reason = f"none of its {self.count:,} rows can be run: {why}."
        super().__post_init__()


class ExportError(CrewError):
    """The export cannot be written. The crew database has all ended rows. Run the batch again with the same name."""


class StoreError(CrewError):
    """The crew database cannot be used.

    `operation` is the function of the store that failed, and `started` whether a run was started: "yes", "no" or
    "unknown".
    """

    def __init__(self, message: str, *, operation: str, started: str) -> None:
        super().__init__(message)
        self.operation, self.started = operation, started


class PrefectAwayError(CrewError):
    """The Prefect API does not answer, or no API is set."""


class PrefectRefusedError(CrewError):
    """The Prefect API refuses a request: the API key is wrong (401) or may not do that (403), for example."""


def _clause(text: str) -> str:
    return excerpt(text).rstrip(".")


def _of(kickoff_id: str | None) -> str:
    return f" (run {kickoff_id})" if kickoff_id else ""
