"""One run as this process knows it: its attempt, the texts that it may show, the advice after a failure, its result."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import excerpt
from prefect_crew.artifacts.escape import prose
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.run import MarkdownArtifact, RunView, artifact_key
from prefect_crew.artifacts.telemetry import end_run
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import CrewResult, CrewStatus, Review, TaskResult, TokenUsage
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.crew import Crew, CrewSession, titled
from prefect_crew.exceptions import (
    ConfigurationError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    NoResultError,
    OutputTypeError,
    StoreError,
)
from prefect_crew.prices import cost_of
from prefect_crew.runs.database import in_store
from prefect_crew.runs.prune import prune_in_passing
from prefect_crew.runs.reviews.callbacks import forget_callbacks
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState, is_stopped_by_person
from prefect_crew.store.questions import Question

if TYPE_CHECKING:
    from prefect_crew.runs.request import RunRequest


WITHHELD = "withheld: it may contain secret inputs, whose values are not known here"
WITHHELD_WORD = "(withheld)"
_ID = re.compile(r"[\w.-]{1,80}", re.ASCII)  # an id or one word: nobody writes an input into it
_TEXTS = ("raw_state", "message", "current_task", "last_task", "last_step", "human_task_id")
_TASK_TEXTS = ("name", "agent", "output", "data", "description")
NOT_SHOWN = "not shown"
"""The error, in an event or the crew database, whose text the crew's `show` or a secret input keeps out of there."""
LARGEST_RESULT = 5_000_000
"""Bytes of JSON. A larger result is read from the crew's server."""


_KEPT = 1000
"""The number of newest runs that a process remembers, in their state right after the kickoff."""
_kicked_off: OrderedDict[str, LiveRun] = OrderedDict()
# By kickoff id. Not an argument: a user's own flow passes only the id from the kickoff to the wait, and the crew
# database has neither secret inputs nor `meta` nor webhooks.


class StoredResult(BaseModel):
    """The part of a result that the crew database keeps."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    output: str
    data: Any = None
    tasks: list[TaskResult] = Field(default_factory=list[TaskResult])
    execution_time: float | None = None
    usage: TokenUsage | None = None

    @classmethod
    def of(cls, result: CrewResult) -> StoredResult:
        """Copy a result without the raw bodies of the server's answers."""
        tasks = [task.model_copy(update={"raw": None}) for task in result.tasks]
        return cls.model_validate({**dict(result), "tasks": tasks})

    def result(self, attempt: Attempt) -> CrewResult:
        """Return the result of an attempt. Its `raw` is None: the crew database does not keep the raw body."""
        return with_facts(CrewResult(kickoff_id=str(attempt.first_id), **dict(self)), attempt)


def with_facts(result: CrewResult, attempt: Attempt) -> CrewResult:
    """Return a result with the key, the tokens and the cost of its attempt."""
    usage = None if attempt.usage is None else TokenUsage.model_validate(attempt.usage)
    facts = {"idempotency_key": attempt.key, "usage": usage or result.usage, "cost": attempt.cost}
    return result.model_copy(update=facts)


class LiveRun:
    """One run as this process knows it: a public function makes it once, and passes it on from the kickoff to the end.

    It is no dataclass, because a task takes it as its crew, and Prefect would inspect all fields of a dataclass.

    Args:
        crew: The run's crew. An open session stays open; else the run gets a session of its own to enter.
        kickoff_id: The run's first id, "" before the kickoff.
        attempt: The run's attempt. None before it is read, or if no attempt has the kickoff id.
        request: The request of its kickoff. None if only the id is known.
        owned: Whether this process has started the run.
        is_found: Whether another call has started the run. That call's secret inputs may differ from the request's.
    """

    def __init__(
        self,
        crew: Crew | CrewSession,
        kickoff_id: str = "",
        attempt: Attempt | None = None,
        request: RunRequest | None = None,
        *,
        owned: bool = False,
        is_found: bool = False,
    ) -> None:
        self.session = crew if isinstance(crew, CrewSession) else CrewSession(crew)
        self.kickoff_id = kickoff_id
        self.attempt = attempt
        self.request = request
        self.owned = owned
        self.is_found = is_found
        self.is_fresh = False
        """Whether the kickoff has just set the attempt, so that the wait need not read it."""
        self.is_unread = False
        """Whether reading its attempt failed. Then nobody here knows which of its inputs are secret."""
        self.advice: str | None = None
        """The advice after a failure, if it is not the usual one."""
        self.task_seen: str | None = None
        """The crew's task in the last status that named one."""
        self._redactor: tuple[Crew, RunRequest | None, Redactor] | None = None

    @classmethod
    def of(cls, crew: Crew, kickoff_id: str) -> LiveRun:
        """Return the run of a kickoff id, with request and attempt if this process has kicked it off."""
        run = _kicked_off.get(kickoff_id)
        return cls(crew, kickoff_id) if run is None or run.crew.url != crew.url else run.anew(crew)

    def anew(self, crew: Crew) -> LiveRun:
        """Return the same run with a session of its own, for another call, which may be on another event loop."""
        run = LiveRun(crew, self.kickoff_id, self.attempt, self.request, is_found=self.is_found)
        run.advice = self.advice
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

    def take(self, inputs: Inputs) -> None:
        """Take its inputs again, with the results of other tasks in place of their futures."""
        if self.request is not None and self.request.inputs is not inputs:
            self.request = replace(self.request, inputs=inputs)

    @cached_property
    def title(self) -> str:
        """Its title on Prefect's pages. Its request is known."""
        request = self.request
        if request is None:
            return self.crew.label
        shown, secret = request.inputs.shown(self.redact), request.inputs.secret_names
        words = {name: shown[name] for name in shown if self.crew.show == "full" and name not in secret}
        return titled(self.crew.label, request.options.idempotency_key, words)

    @property
    def current_id(self) -> str:
        """The id under which the run goes on: a hosted crew gives another one with each answer of a person."""
        return (self.attempt and self.attempt.kickoff_id) or self.kickoff_id

    @property
    def has_webhooks(self) -> bool:
        """Whether the kickoff asked for webhooks to this package's receiver."""
        return self.attempt is not None and self.attempt.has_webhooks

    @property
    def idempotency_key(self) -> str | None:
        """Its idempotency key, None without an attempt on record."""
        return None if self.attempt is None else self.attempt.key

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
        label = self.crew.label
        return MarkdownArtifact(
            artifact_key(label),
            f"Run {prose(self.kickoff_id)} of crew {prose(label)}",
            flow_run_id=None if self.attempt is None else self.attempt.flow_run_id,
            is_new=self.owned,
        )

    @property
    def attempt_number(self) -> str | None:
        """The text "attempt N of at most M"; None without an attempt on record."""
        number = None if self.attempt is None else self.attempt.number
        return None if number is None else f"attempt {number} of at most {self.crew.max_attempts}"

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
        crew, request = self.crew, self.request
        if self._redactor is None or self._redactor[0] is not crew or self._redactor[1] is not request:
            self._redactor = crew, request, crew.redactor(None if request is None else request.inputs)
        return self._redactor[2]

    @property
    def is_blind(self) -> bool:
        """Whether the run has secret inputs whose values are unknown here, so that no text can be masked.

        A call that finds a run may have other secrets than the call that started it. A later turn of a session may show
        the secrets of an earlier one, which the Flow's state holds, and a step of a pipeline those of another step.
        """
        if self.request is not None and self.request.inputs.is_hidden:
            return True
        recorded = None if self.attempt is None else self.attempt.secret_names
        is_later_turn = self.attempt is not None and (self.attempt.turn or 0) > 1
        if self.request is None or is_later_turn:
            return bool(self.is_unread or self.crew.secret_inputs or recorded)
        return self.is_found and bool(self.is_unread or recorded)

    @property
    def show(self) -> str:
        """The crew's `show`, but no output ("summary") if unknown secret inputs cannot be masked."""
        return "summary" if self.is_blind and self.crew.show == "full" else self.crew.show

    def redact_text(self, text: str) -> str:
        """Mask a text of the crew for logs, errors, events and the crew database."""
        return WITHHELD if text and self.is_blind else self.redact(text)

    def redact_name(self, word: str) -> str:
        """Mask a name that the crew gave, such as a task's, for logs, events and the crew database."""
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
        attempt, key = self.attempt, self.idempotency_key
        failed = None if status is None or self.is_blind else status.current_task or self.task_seen
        has_failed = status is not None and status.state in (CrewState.FAILED, CrewState.STOPPED)
        return RunView(
            crew=self.crew.label,
            kickoff_id=self.kickoff_id,
            current_id=self.current_id,
            idempotency_key=self.idempotency_key,
            state=CrewState.PENDING if status is None else status.state,
            started_at=None if attempt is None or attempt.started_at is None else moment(attempt.started_at),
            ended_at=None if attempt is None or attempt.ended_at is None else moment(attempt.ended_at),
            inputs=None if self.request is None else self.request.inputs.shown(self.redact),
            status=None if status is None else self.redact_status(status),
            show=self.show,
            cost=None if attempt is None else attempt.cost,
            page_url=self.crew.page_url,
            flow_run_id=None if attempt is None else attempt.flow_run_id,
            read_result=None if key is None else f"prefect-crew result {self.as_argument(key)}",
            notes=notes,
            to_do=to_do,
            reviews=reviews,
            failed_task=None if failed is None else self.redact(failed),
            # Only a failed run shows its attempt and an advice.
            attempt=self.attempt_number if has_failed else None,
            advice=next_step(self) if has_failed else "",
        )


async def read_attempt(run: LiveRun, *, is_needed: bool = False) -> None:
    """Read the attempt of a run. If the crew database cannot be used, keep the one that is known.

    Raises:
        ConfigurationError: The run is of another crew.
        StoreError, PREFECT_ERRORS: It `is_needed`, and the crew database cannot be used.
    """
    kickoff_id, crew, found = run.kickoff_id, run.crew, run.attempt
    run.is_unread = False
    try:
        if run.attempt is not None:
            found = await in_store(attempts.get, run.attempt.id)
        else:
            holders = await in_store(attempts.of_kickoff_id, kickoff_id)
            own = [attempt for attempt in holders if attempt.crew_url == crew.url]
            found = next(iter(own or holders), None)
    except (StoreError, *PREFECT_ERRORS) as error:
        if is_needed:
            raise
        run.is_unread = run.attempt is None
        run_logger().warning(
            "The attempt of run %s could not be read (%s). This call goes on without it.", kickoff_id, error
        )
    if found is not None and found.crew_url != crew.url:
        raise ConfigurationError(
            f"Run {kickoff_id} is of crew {found.crew} at {found.crew_url}, not of crew {crew.label} at {crew.url}. "
            f"Nothing was sent. Give the crew {found.crew} with this kickoff id."
        )
    if found is not None and found.first_id is not None:
        run.kickoff_id = found.first_id
    run.attempt, run.owned = found, False


async def read_status(run: LiveRun) -> CrewStatus:
    """Make the status call for a run in an open session, and return the answer.

    A hosted crew answers NOT FOUND while it waits for a person, and goes on under another id after the answer. So this
    asks for the run's newest id, and a run with an open question that a webhook brought waits for a person. The status
    has the run's first id. Where the crew database does not answer, it says what the crew's server said.
    """
    status, attempt = await run.session.call(lambda client: client.status(run.current_id)), run.attempt
    was_asked = attempt is not None and (attempt.human_since or attempt.human_seconds)
    if attempt is not None and (status.state is CrewState.UNKNOWN or (was_asked and status.state not in _GOES_ON)):
        before, question = run.current_id, None
        try:
            question = await follow(run)
        except (StoreError, *PREFECT_ERRORS) as error:
            run_logger().debug("The questions of run %s could not be read: %r", run.kickoff_id, error)
        if run.current_id != before:
            status = await run.session.call(lambda client: client.status(run.current_id))
        if status.state is CrewState.UNKNOWN and question is not None and question.sent_at is None:
            status = status.model_copy(update={"state": CrewState.WAITING, "human_task_id": question.task})
    return status.model_copy(update={"kickoff_id": run.kickoff_id})


_GOES_ON = (CrewState.PENDING, CrewState.RUNNING)


async def follow(run: LiveRun) -> Question | None:
    """Read the attempt of a run again, with the id under which it goes on. Return its last question, or None.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database cannot be used.
    """
    if run.attempt is None:
        return None
    goes_on_as(run, await in_store(attempts.get, run.attempt.id) or run.attempt)
    asked = await in_store(questions.questions_of, run.attempt.id)
    return asked[-1] if asked else None


def goes_on_as(run: LiveRun, attempt: Attempt) -> None:
    """Set the attempt as it is now, and log the id under which the run goes on, if it is another one."""
    before, run.attempt = run.current_id, attempt
    if run.current_id != before:
        run_logger().info("Crew run %s goes on as run %s.", run.kickoff_id, run.current_id)


# Ends


async def write_end(run: LiveRun, status: CrewStatus) -> bool:
    """Write the end of a run by the status of its last id. Whoever writes it also writes the span and the event.

    The crew database keeps no error of a run with secret inputs, and a result only if masking changes nothing in it:
    later calls read the status again. Return whether this call wrote the end; if not, somebody else did, or the run
    goes on under another id. `run.attempt` is as it is now.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database cannot be used.
    """
    assert run.attempt is not None  # noqa: S101  the callers looked
    error = NOT_SHOWN if status.error and run.show == "none" else run.redact_text(status.error or "")[:500] or None
    usage, body = status.usage, None
    if status.state is CrewState.COMPLETED and run.show == "full":
        stored = StoredResult.of(status.result())
        body = stored.model_dump(mode="json")
        if len(stored.model_dump_json().encode()) > LARGEST_RESULT or run.redact.hides(body):
            body = None
    ended = await in_store(
        attempts.ended,
        run.attempt,
        run.current_id,
        _ENDINGS[status.state],
        error=error if run.show == "full" and not run.attempt.secret_names else None,
        usage=None if usage is None else usage.model_dump(exclude_none=True),
        tokens=usage and usage.total_tokens,
        cost=cost_of(run.crew.price, usage),
        result=body,
    )
    if ended is None:
        goes_on_as(run, await in_store(attempts.get, run.attempt.id) or run.attempt)
        return False
    run.attempt = ended
    if ended.human_since is not None or ended.human_seconds:  # most runs never ask
        await forget_callbacks(ended)
    end_run(ended)
    if ended.batch is None or status.state is not CrewState.COMPLETED:  # thousands of rows complete
        facts: dict[str, Any] = {"state": str(status.state), "error": error, "execution_time": status.execution_time}
        emit(str(status.state), ended, once=True, **facts)
    await prune_in_passing()
    return True


async def look_once(run: LiveRun) -> None:
    """Read the status of a run in an open session once, and write the end if it has ended."""
    with suppress(CrewError):
        status = await read_status(run)
        if status.state.ended:
            await write_end(run, status)


_ENDINGS: Any = {
    CrewState.COMPLETED: AttemptState.COMPLETED,
    CrewState.FAILED: AttemptState.FAILED,
    CrewState.STOPPED: AttemptState.STOPPED,
}
CREW_STATES = {ending: state for state, ending in _ENDINGS.items()} | {AttemptState.LOST: CrewState.UNKNOWN}
"""The state of the run of an attempt that has ended."""


def next_step(run: LiveRun) -> str:
    """Return the advice for a person after the failure of a run."""
    if run.advice is not None or run.attempt is None:
        return run.advice or "Correct the crew, then start another run."
    more = "A retry of its caller, or a call with the same key, starts the crew again."
    if is_stopped_by_person(run.attempt):
        more = "A new call with the same key starts the crew again."
    if run.attempt.number >= run.crew.max_attempts:
        more = _more_attempts(run.crew)
    return f"This was {run.attempt_number} under its key. {more}"


def no_attempt_left(crew: Crew) -> str:
    """Return the advice for an idempotency key that has no attempt left."""
    return (
        f"Nothing was started: crew {crew.label} allows {crew.max_attempts} attempts at one idempotency key "
        f"(max_attempts). {_more_attempts(crew)}"
    )


def _more_attempts(crew: Crew) -> str:
    if crew.block is None:
        return "For more: in Python raise max_attempts of the crew, or force_new=True; on the command line --force-new."
    return (
        f"For more: in Prefect's UI raise max_attempts on the block deployed-crew/{crew.block} and retry the flow "
        "run; for a deployment of run_deployed_crew set its parameter force_new; in Python force_new=True; on the "
        "command line --force-new."
    )


def result_of(run: LiveRun, status: CrewStatus) -> CrewResult:
    """Return the result of a completed run. Raise an error for each other state."""
    if status.state is CrewState.COMPLETED:
        if run.attempt is not None and run.attempt.ended_at is not None:
            return with_facts(status.result(), run.attempt)
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
    """Return the result of a completed run: from the crew database, else from the status call.

    Raises:
        CrewFailedError, CrewStoppedError: The run failed or was stopped.
        CrewLostError: The server has forgotten the run, or the result.
        CrewError: The run has not ended, or the status call failed.
    """
    attempt, last = run.attempt, None if run.attempt is None else "started"
    if attempt is not None and attempt.state in CREW_STATES:
        last = str(attempt.state)
        if attempt.state is not AttemptState.COMPLETED:
            error = attempt.error
            if error is None and attempt.state is AttemptState.FAILED:  # it is not kept, as it may hold a secret
                with suppress(CrewError), withholding(run.redact_text):
                    error = run.redact_text((await read_status(run)).error or "")
            raise failure(run, CREW_STATES[attempt.state], error)
        try:
            body = await in_store(attempts.result_of, attempt.id)
        except (StoreError, *PREFECT_ERRORS) as error:
            run_logger().warning("The result of run %s could not be read here: %s", run.kickoff_id, error)
            body = None
        if body is not None:
            return StoredResult.model_validate(body).result(attempt)
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
        f"The result of run {result.kickoff_id} does not fit {output_type.__name__}: {'; '.join(problems)}. The text: "
        f"{excerpt(result.output if quote is None else quote) or 'empty'}. The result is on record. Correct the type, "
        "or leave output_type out, and run again with the same key, which starts no other run.",
        kickoff_id=result.kickoff_id,
        output=result.output,
        problems=problems,
    )
    del result  # error reporters show the local variables of all frames
    raise refusal
