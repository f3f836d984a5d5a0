"""One run as this process knows it: its record, the texts that it may show, the advice after a failure, its result."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.escape import prose
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.run import CLAIM, MarkdownArtifact, RunView, artifact_key
from prefect_crew.artifacts.telemetry import end_run
from prefect_crew.client.models import CrewResult, CrewStatus, Review
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import (
    ConfigurationError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    NoResultError,
    OutputTypeError,
)
from prefect_crew.prices import cost_of
from prefect_crew.records.budgets import change, corrections
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, StoredResult, utcnow
from prefect_crew.records.notes import Note, kept_note, kept_questions
from prefect_crew.records.results import stored_result
from prefect_crew.records.store import PrefectRecords, record_name
from prefect_crew.runs.limits import release
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.runs.options import RunOptions, RunRequest


WITHHELD = "withheld: it may contain secret inputs, whose values are not known here"
WITHHELD_WORD = "(withheld)"
_ID = re.compile(r"[\w.-]{1,80}", re.ASCII)  # an id or one word: nobody writes an input into it
_TEXTS = ("raw_state", "message", "current_task", "last_task", "last_step", "human_task_id")
_TASK_TEXTS = ("name", "agent", "output", "data", "description")


_KEPT = 1000
"""The number of newest runs that a process remembers, in their state right after the kickoff."""
_kicked_off: OrderedDict[str, LiveRun] = OrderedDict()
# By kickoff id. Not an argument: a user's own flow passes only the id from the kickoff to the wait, and a record has
# neither secret inputs nor `meta` nor webhooks.


class LiveRun:
    """One run as this process knows it: a public function makes it once, and passes it on from the kickoff to the end.

    It is no dataclass, because a task takes it as its crew, and Prefect would inspect all fields of a dataclass.

    Args:
        crew: The run's crew. An open session stays open; else the run gets a session of its own to enter.
        kickoff_id: The run's id, "" before the kickoff.
        record: The run's record. None before the record is read, or if no record has the kickoff id.
        request: The request of its kickoff. None before the kickoff, or if only the id is known.
        records: The store of the run's record.
        owned: Whether this process has started the run, so that nobody else closes it.
        is_found: Whether another call has started the run. That call's secret inputs may differ from the request's.
        options: The options of `run_crew`, for its two tasks.
    """

    def __init__(
        self,
        crew: Crew | CrewSession,
        kickoff_id: str = "",
        record: RunRecord | None = None,
        request: RunRequest | None = None,
        *,
        records: RecordStore | None = None,
        owned: bool = False,
        is_found: bool = False,
        options: RunOptions | None = None,
    ) -> None:
        self.session = crew if isinstance(crew, CrewSession) else CrewSession(crew)
        self.kickoff_id = kickoff_id
        self.record = record
        self.request = request
        self.records: RecordStore = PrefectRecords() if records is None else records
        self.owned = owned
        self.is_found = is_found
        self.options = options
        self.is_fresh = False
        """Whether the kickoff has just set the record, so that the wait need not read it."""
        self.is_unread = False
        """Whether reading its record failed. Then nobody here knows which of its inputs are secret."""
        self.advice: str | None = None
        """The advice after a failure, if it is not the usual one."""
        self.task_seen: str | None = None
        """The crew's task in the last status that named one."""
        self._redactor: tuple[Crew, Redactor] | None = None
        self._continued_as: str | None = None

    @classmethod
    def of(cls, crew: Crew, kickoff_id: str) -> LiveRun:
        """Return the run of a kickoff id, with request and record if this process has kicked it off."""
        run = _kicked_off.get(kickoff_id)
        return cls(crew, kickoff_id) if run is None or run.crew.url != crew.url else run.anew(crew)

    def anew(self, crew: Crew) -> LiveRun:
        """Return the same run with a session of its own, for another call, which may be on another event loop."""
        record = None if self.record is None else self.record.model_copy(deep=True)
        run = LiveRun(crew, self.kickoff_id, record, self.request, is_found=self.is_found)
        run.advice, run._continued_as = self.advice, self._continued_as
        return run

    def remember(self) -> None:
        """Remember this run for `LiveRun.of`."""
        _kicked_off[self.kickoff_id] = self.anew(self.crew)
        if len(_kicked_off) > _KEPT:
            _kicked_off.popitem(last=False)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            TypeError: The run holds the token and the inputs, and a session of this process.
        """
        raise TypeError("A live run cannot be pickled: it holds secrets. Pass the crew and the kickoff id instead.")

    def __repr__(self) -> str:  # without texts of the crew or the caller
        return f"LiveRun({self.kickoff_id!r} of crew {self.crew.label!r})"

    @property
    def crew(self) -> Crew:
        """Its crew, with the newest token."""
        return self.session.crew

    @property
    def current_id(self) -> str:
        """The id under which the run goes on: a hosted crew gives another one with each answer of a person."""
        return self._continued_as or self.kickoff_id

    @current_id.setter
    def current_id(self, kickoff_id: str) -> None:
        self._continued_as = kickoff_id

    @property
    def idempotency_key(self) -> str | None:
        """Its idempotency key, None without a record."""
        return None if self.record is None else self.record.idempotency_key

    @property
    def names(self) -> dict[str, Any]:
        """The run's names as keyword arguments of an error."""
        return {"kickoff_id": self.kickoff_id, "crew": self.crew.label, "idempotency_key": self.idempotency_key}

    def as_argument(self, name: str | None = None) -> str:
        """Return the run as an argument of a command: `name`, such as its key, else its id.

        `--crew URL` follows if the crew is not a stored block.
        """
        crew = "" if self.crew.block else f" --crew {shlex.quote(self.crew.url)}"
        return f"{shlex.quote(name or self.kickoff_id)}{crew}"

    @cached_property
    def artifact(self) -> MarkdownArtifact:
        """Its artifact, which may not exist on the server yet."""
        record, label = self.record, self.crew.label
        claim = None if record is None else record_name(record.idempotency_key, record.attempt)
        return MarkdownArtifact(
            artifact_key(label),
            f"Run {prose(self.kickoff_id)} of crew {prose(label)}",
            flow_run_id=None if record is None else record.flow_run_id,
            is_new=self.owned,
            metadata=None if claim is None else {CLAIM: claim, "kickoff_id": self.kickoff_id},
        )

    @property
    def attempt(self) -> str | None:
        """The text "attempt N of at most M"; None without a record."""
        return None if self.record is None else f"attempt {self.record.attempt} of at most {self.crew.max_attempts}"

    def notify(self, status: CrewStatus | None) -> None:
        """Note the current task of a status, and call the crew's `on_status`; with None for the run itself."""
        if status is not None and (task := status.current_task):
            self.task_seen = task
        if self.crew.on_status is not None:
            self.crew.on_status(self, status)

    # Masking

    @property
    def redact(self) -> Redactor:
        """The redactor, which masks the tokens and the secret inputs."""
        crew = self.crew
        if self._redactor is None or self._redactor[0] is not crew:  # its session has renewed the token
            self._redactor = crew, crew.redactor(None if self.request is None else self.request.inputs)
        return self._redactor[1]

    @property
    def is_blind(self) -> bool:
        """Whether the run has secret inputs whose values are unknown here, so that no text can be masked.

        A call that finds a run may have other secrets than the call that started it. A later turn of a session may show
        the secrets of an earlier one, which the Flow's state holds, and a step of a pipeline those of another step.
        """
        if self.request is not None and self.request.inputs.is_hidden:
            return True
        recorded = [] if self.record is None else self.record.secret_inputs
        is_later_turn = self.record is not None and (self.record.turn or 0) > 1
        if self.request is None or is_later_turn:
            return bool(self.is_unread or self.crew.secret_inputs or recorded)
        return self.is_found and bool(self.is_unread or recorded)

    @property
    def show(self) -> str:
        """The crew's `show`, but no output ("summary") if unknown secret inputs cannot be masked."""
        return "summary" if self.is_blind and self.crew.show == "full" else self.crew.show

    def redact_text(self, text: str) -> str:
        """Mask a text of the crew for logs, errors, events and records."""
        return WITHHELD if text and self.is_blind else self.redact(text)

    def redact_name(self, word: str) -> str:
        """Mask a name that the crew gave, such as a task's, for logs, events and records."""
        if self.is_blind:
            return word if _ID.fullmatch(word) else WITHHELD_WORD
        return self.redact(word)

    def redact_status(self, status: CrewStatus) -> CrewStatus:
        """Return a status without its raw body and with every secret masked. A blind run's status has no texts."""
        if self.is_blind:
            output = None if status.output is None else "*" * len(status.output)
            texts = {**dict.fromkeys((*_TEXTS, "data"), None), "error": status.error and WITHHELD}
            empty: dict[str, Any] = {"tasks": [], "raw": None}
            return status.model_copy(update={**texts, **empty, "output": output})
        tree = self.redact.tree
        tasks = [
            task.model_copy(update={**{name: tree(getattr(task, name)) for name in _TASK_TEXTS}, "raw": None})
            for task in status.tasks
        ]
        texts = {name: tree(getattr(status, name)) for name in (*_TEXTS, "data", "output", "error")}
        return status.model_copy(update={**texts, "tasks": tasks, "raw": None})

    def view(
        self,
        status: CrewStatus | None,
        *,
        notes: Sequence[str] = (),
        to_do: Sequence[str] = (),
        reviews: Sequence[Review] = (),
    ) -> RunView:
        """Return the content of the artifact; `status` is None right after the kickoff."""
        record = self.record
        failed = None if status is None or self.is_blind else status.current_task or self.task_seen
        has_failed = status is not None and status.state in (CrewState.FAILED, CrewState.STOPPED)
        return RunView(
            crew=self.crew.label,
            kickoff_id=self.kickoff_id,
            current_id=self.current_id,
            idempotency_key=self.idempotency_key,
            state=CrewState.PENDING if status is None else status.state,
            started_at=None if record is None else record.kicked_off_at,
            ended_at=None if record is None else record.ended_at,
            inputs=None if self.request is None else self.request.inputs.shown(self.redact),
            status=None if status is None else self.redact_status(status),
            show=self.show,
            cost=None if record is None else record.cost,
            page_url=self.crew.page_url,
            flow_run_id=None if record is None else record.flow_run_id,
            read_result=None if record is None else f"prefect-crew result {self.as_argument(record.idempotency_key)}",
            notes=notes,
            to_do=to_do,
            reviews=reviews,
            failed_task=None if failed is None else self.redact(failed),
            # Only a failed run shows its attempt and an advice.
            attempt=self.attempt if has_failed else None,
            advice=next_step(self) if has_failed else "",
        )


async def read_record(run: LiveRun, idempotency_key: str | None = None) -> None:
    """Read the record of a run by its key, else by its id. If the Prefect API does not answer, keep its record.

    Raises:
        ConfigurationError: The run is of another crew.
    """
    kickoff_id, crew, record = run.kickoff_id, run.crew, None
    run.is_unread = False
    try:
        if idempotency_key is None:
            record = await run.records.of_kickoff(kickoff_id)
        else:
            attempts = await run.records.attempts(idempotency_key)
            record = next((attempt for attempt in attempts if attempt.kickoff_id == kickoff_id), None)
            # The key may be a template that another process has filled.
            record = record or await run.records.of_kickoff(kickoff_id)
    except PREFECT_ERRORS as error:
        record, run.is_unread = run.record, run.record is None
        run_logger().warning(
            "The record of run %s could not be read (%s). This call goes on without it.",
            kickoff_id,
            error,
        )
    if record is not None and record.crew_url != crew.url:
        raise ConfigurationError(
            f"Run {kickoff_id} is of crew {record.crew} at {record.crew_url}, not of crew {crew.label} at {crew.url}. "
            f"Nothing was sent. Give the crew {record.crew} with this kickoff id."
        )
    run.record, run.owned = record, False


def answers_record(run: LiveRun) -> RunRecord:
    """Return the record that answers are stored under: the run's record, or a stand-in for a run that has no record.

    The stand-in itself is never stored.
    """
    return run.record or RunRecord(
        idempotency_key=f"kickoff id {run.kickoff_id}",
        attempt=1,
        crew=run.crew.label,
        crew_url=run.crew.url,
        inputs_digest="",
        owner="",
        claimed_at=utcnow(),
        kickoff_id=run.kickoff_id,
    )


async def read_status(run: LiveRun) -> CrewStatus:
    """Make the status call for a run in an open session, and return the answer.

    A hosted crew answers NOT FOUND while it waits for a person, and goes on under another id after the answer. So this
    asks for the run's newest id, and a run with an open question that a webhook brought waits for a person. The status
    has the run's first id. Where the Prefect API does not answer, it says what the crew's server said.
    """
    status, record = await _status_of(run), run.record
    was_asked = record is not None and (record.human_since or record.human_seconds or record.human_task)
    if status.state is CrewState.UNKNOWN or (was_asked and status.state not in _GOES_ON):
        before, task_id = run.current_id, None
        try:
            task_id = await follow(run)
        except (*PREFECT_ERRORS, CrewError) as error:
            run_logger().debug("The questions of run %s could not be read: %r", run.kickoff_id, error)
        if run.current_id != before:
            status = await _status_of(run)
        if status.state is CrewState.UNKNOWN and task_id is not None:
            status = status.model_copy(update={"state": CrewState.WAITING, "human_task_id": task_id})
    return status.model_copy(update={"kickoff_id": run.kickoff_id})


_GOES_ON = (CrewState.PENDING, CrewState.RUNNING)


async def _status_of(run: LiveRun) -> CrewStatus:
    return await run.session.call(lambda client: client.status(run.current_id))


async def follow(run: LiveRun) -> str | None:
    """Set the id under which a run goes on. Return the task of an open question that a webhook brought, or None.

    The answer to `/resume` has the id. If that answer was lost, a webhook of the next round has it: its signed URL
    names the round.
    """
    record = answers_record(run)
    answers = await run.records.reviews(record)
    note = await kept_note(record, len(answers)) if record.has_webhooks else Note(None)
    known_ids = [run.kickoff_id, *(answer.continued_as for answer in answers if answer.continued_as)]
    if answers and answers[-1].continued_as is None and note.kickoff_id not in (None, known_ids[-1]):
        update = {"continued_as": note.kickoff_id, "outcome": "sent", "moved_on": True}
        await run.records.save_review(record, len(answers), answers[-1].model_copy(update=update))
        known_ids.append(str(note.kickoff_id))
    goes_on_as(run, known_ids[-1])
    if record.has_webhooks and note.kickoff_id is None and answers and answers[-1].outcome != "sent":
        note = await kept_note(record, len(answers) - 1)  # nobody knows whether the answer arrived: so it still waits
    if note.task_id is not None:
        return note.task_id
    question = (await kept_questions(run.current_id)).get(run.current_id)
    is_open = question is not None and all(answer.question_id != question.id for answer in answers)
    return question.task_id if question is not None and is_open else None


def goes_on_as(run: LiveRun, kickoff_id: str) -> None:
    """Set the id under which a run goes on, and log a new one."""
    if kickoff_id != run.current_id:
        run_logger().info("Crew run %s goes on as run %s.", run.kickoff_id, kickoff_id)
        run.current_id = kickoff_id


# Ends


def end_of(
    crew: Crew, status: CrewStatus, human: float, error: str | None, result: StoredResult | None
) -> dict[str, Any]:
    """Return the end of a run, for `close_run`, with the seconds that people took.

    `error` and `result` are masked already.
    """
    used = {"usage": status.usage, "cost": cost_of(crew.price, status.usage)}
    return {"state": status.state, "human_seconds": human, "error": error, "result": result, **used}


async def close_run(
    record: RunRecord,
    records: RecordStore,
    end: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> bool:
    """Store a run's end. The call that creates it also changes the counters of budgets, writes the span and the event,
    and gives the run's slot back.

    If a run used more than its estimate, the difference is added first, and taken off again if somebody else has closed
    the run. If it used less, the difference is taken off last. A process that dies in between leaves counters too high.

    Args:
        record: The run's record.
        records: The store of the record. This function raises the errors of the store.
        end: The result of `end_of`.
        report: The payload of the event beyond the state; None for no event.

    Returns:
        Whether this call has closed the run. If not, the record has the end that somebody else stored.
    """
    end = {"reason": record.reason, **end}  # the reason says that a batch stopped its row
    changes = corrections(record.model_copy(update=end)) if record.estimates else {}
    more = {name: slots for name, slots in changes.items() if slots > 0}
    less = {name: slots for name, slots in changes.items() if slots < 0}
    counted = await change(record, more) if more else {}
    if not await records.end(record, **end):
        await change(record, {name: -slots for name, slots in counted.items()})
        return False
    if less:
        await change(record, less)
    end_run(record)
    if report is not None:
        emit(str(record.state), record, once=True, state=str(record.state), **report)
    if record.slot is not None:
        await release(UUID(record.slot), record.crew)
    return True


def next_step(run: LiveRun) -> str:
    """Return the advice for a person after the failure of a run."""
    if run.advice is not None or run.record is None:
        return run.advice or "Correct the crew, then start another run."
    more = "A retry of its caller, or a call with the same key, starts the crew again."
    if run.record.attempt >= run.crew.max_attempts:
        more = _more_attempts(run.crew.label)
    return f"This was {run.attempt} under its key. {more}"


def no_attempt_left(crew: Crew) -> str:
    """Return the advice for an idempotency key that has no attempt left."""
    return (
        f"Nothing was started: crew {crew.label} allows {crew.max_attempts} attempts at one idempotency key "
        f"(max_attempts). {_more_attempts(crew.label)}"
    )


def _more_attempts(crew: str) -> str:
    return (
        f"For more: in Prefect's UI raise max_attempts on the block deployed-crew/{crew} and retry the flow "
        "run; for a deployment of run_deployed_crew set its parameter force_new; in Python force_new=True; on the "
        "command line --force-new."
    )


def result_of(run: LiveRun, status: CrewStatus) -> CrewResult:
    """Return the result of a completed run. Raise an error for each other state."""
    if status.state is CrewState.COMPLETED:
        record = run.record
        if record is not None and record.phase is RecordPhase.ENDED:
            return record.completed(status.result())
        facts = {"cost": cost_of(run.crew.price, status.usage), "idempotency_key": run.idempotency_key}
        return status.result().model_copy(update=facts)
    raise failure(run, status.state, run.redact_text(status.error or ""))


def failure(run: LiveRun, state: CrewState | None, error: str | None) -> CrewError:
    """Return the error for a run that has no result; `error` is the crew's own, already masked."""
    names = run.names
    if state is CrewState.FAILED:
        return CrewFailedError(error=error or "", advice=next_step(run), **names)
    if state is CrewState.STOPPED:
        return CrewStoppedError(advice=next_step(run), **names)
    if state is CrewState.UNKNOWN:
        return CrewLostError(**names)
    return NoResultError(
        f"Run {run.kickoff_id} of crew {run.crew.label} has no result yet: it is {state}. Wait for it with "
        "wait_for_crew."
    )


async def read_result(run: LiveRun) -> CrewResult:
    """Return the result of a completed run: from its record, else from the status call.

    Raises:
        CrewFailedError, CrewStoppedError: The run failed or was stopped.
        CrewLostError: The server has forgotten the run, or the result.
        CrewError: The run has not ended, or the status call failed.
    """
    record, last = run.record, None if run.record is None else "started"
    if record is not None and record.phase is RecordPhase.ENDED:
        last = str(record.state)
        if record.state is not CrewState.COMPLETED:
            raise failure(run, record.state, record.error)
        if (stored := await stored_result(record)) is not None:
            return record.completed(stored.result(run.kickoff_id))
    with withholding(run.redact_text):
        status = await read_status(run)
    if status.state is CrewState.UNKNOWN:
        raise CrewLostError(**run.names, last_state=last)
    return result_of(run, status)


def parse_data(
    result: CrewResult, output_type: type[BaseModel] | None, *, run: LiveRun | None = None
) -> CrewResult[Any]:
    """Return the result with its `data` as an instance of `output_type`; unchanged if that is None.

    Raises:
        OutputTypeError: The structured result, or without one the text, does not fit the model, or one of its
            validators failed. The message shows the text only if `run` may show it; `output` has the whole text.
    """
    if output_type is None:
        return result
    # A validator's message may quote the result; its type does not.
    is_quoted = run is None or run.show == "full"
    try:
        if result.data is None:
            data = output_type.model_validate_json(result.output)
        else:
            data = output_type.model_validate_json(to_json(result.data))  # a strict model takes dates from JSON only
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'the text'}: {problem['msg' if is_quoted else 'type']}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
    except Exception as error:  # noqa: BLE001  a user's validator may raise anything
        problems = [f"{output_type.__name__}: {type(error).__name__}{f': {error}' if is_quoted else ''}"]
    else:
        return result.model_copy(update={"data": data})
    quote = None
    if run is not None:
        problems = [run.redact(problem) for problem in problems]
        quote = run.redact(result.output) if run.show == "full" else "not shown"
    # Outside of the `except` block: the validator's error quotes the whole result and would become the context.
    refusal = OutputTypeError(
        kickoff_id=result.kickoff_id,
        output_type=output_type.__name__,
        output=result.output,
        problems=problems,
        shown=quote,
    )
    del result  # error reporters show the local variables of all frames
    raise refusal
