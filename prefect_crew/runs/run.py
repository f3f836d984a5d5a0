"""One run in this process: what is known of it, where it is found, and its result."""

from __future__ import annotations

import re
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from prefect.exceptions import PrefectException
from pydantic import BaseModel, ValidationError

from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.markdown import RunView
from prefect_crew.artifacts.run import RunArtifact
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.client.redaction import Redactor, withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError, CrewFailedError, CrewLostError, CrewStoppedError, OutputTypeError
from prefect_crew.records.model import RecordPhase, RunRecord, SentReview
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.advice import after_failure, attempt_of
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks
    from prefect_crew.crew import Crew


_TEXTS = ("raw_state", "message", "current_task", "last_task", "last_step", "human_task_id")
_ID = re.compile(r"[\w.-]{1,80}", re.ASCII)
"""What an id looks like: nothing that somebody would write an input into."""
WITHHELD_WORD = "(withheld)"
_TASK_TEXTS = ("name", "agent", "output", "data", "description")
WITHHELD = "withheld: this crew has secret inputs, and their values, which may stand in it, are not known here"


@dataclass
class OpenRun:
    """A run with a kickoff id.

    `record` is None for a run that no record holds: one that was kicked off elsewhere and is only waited for. `inputs`
    are None where only the id is known. `owned`: this process bought it, so nobody else closes it.
    """

    crew: Crew
    kickoff_id: str
    record: RunRecord | None = None
    inputs: Mapping[str, Any] | None = field(default=None, repr=False)
    owned: bool = False
    artifact: RunArtifact | None = None
    advice: str | None = None
    """What to do about a failure, where that is not the usual."""
    task_seen: str | None = field(default=None, repr=False)
    """The task that the crew was last seen at, in the crew's own words: they may repeat a secret."""
    meta: Mapping[str, Any] | None = field(default=None, repr=False)
    """What the kickoff's caller gave for the crew's webhooks, where that is known here."""
    webhooks: Webhooks | None = field(default=None, repr=False)
    """The user's own targets, which a resume has to name again. They hold secrets, so no record does."""

    def __post_init__(self) -> None:
        """Take up which inputs are secret, where only the record says so: a caller may have given a `SecretStr`."""
        if self.inputs is None and self.record is not None:
            self.crew = self.crew.hiding(self.record.secret_inputs)

    @property
    def idempotency_key(self) -> str | None:
        """Its idempotency key, where a record holds it."""
        return None if self.record is None else self.record.idempotency_key

    def renewed(self, crew: Crew) -> None:
        """Take up the crew with its new token; the old one stays a secret."""
        old = self.crew.token
        if crew.token != old:
            self.crew = crew.hiding(self.crew.secret_inputs, texts=[*self.crew.hidden, old])
            self.__dict__.pop("redact", None)

    @cached_property
    def redact(self) -> Redactor:
        """What masks the token and the secret inputs."""
        return self.crew.redactor(self.inputs)

    @property
    def blind(self) -> bool:
        """Whether the crew has secret inputs whose values are not known here, so that no text can be masked."""
        return self.inputs is None and bool(self.crew.secret_inputs)

    @property
    def show(self) -> str:
        """How much may be shown: no output where secret inputs are unknown and so cannot be masked in it."""
        return "summary" if self.blind and self.crew.show == "full" else self.crew.show

    def told(self, text: str | None) -> str | None:
        """Return a text that the crew wrote as logs, errors, events and records may hold it."""
        if text is None:
            return None
        return WITHHELD if self.blind else self.redact(text)

    def named(self, word: str) -> str:
        """Return a word that the crew gave, such as the name of a task, as logs, events and records may hold it."""
        if self.blind:
            return word if _ID.fullmatch(word) else WITHHELD_WORD
        return self.redact(word)

    @property
    def once_it_answers(self) -> str:
        """What to do about it when its server gave no usable answer for too long."""
        if self.idempotency_key is None:
            return f"The run may go on there; see later: prefect-crew runs show {shlex.quote(self.kickoff_id)}."
        return (
            f"The run may go on there: run again with idempotency key {self.idempotency_key!r} to wait for it, and "
            "buy nothing."
        )

    def withholding(self) -> AbstractContextManager[None]:
        """Let errors of the client that are made meanwhile tell of the server's answers what may be told."""
        return withholding(lambda text: self.told(text) or "")

    def masked(self, status: CrewStatus) -> CrewStatus:
        """Return a status without its raw body, with every secret masked, and without texts where none can be."""
        if self.blind:
            output = None if status.output is None else "*" * len(status.output)
            texts = dict.fromkeys((*_TEXTS, "data"), None)
            return status.model_copy(
                update={**texts, "output": output, "error": self.told(status.error), "tasks": [], "raw": None}
            )
        tree = self.redact.tree
        tasks = [
            task.model_copy(update={**{name: tree(getattr(task, name)) for name in _TASK_TEXTS}, "raw": None})
            for task in status.tasks
        ]
        texts = {name: tree(getattr(status, name)) for name in (*_TEXTS, "data", "output", "error")}
        return status.model_copy(update={**texts, "tasks": tasks, "raw": None})

    def view(
        self, status: CrewStatus | None, *, notes: Sequence[str] = (), reviews: Sequence[SentReview] = ()
    ) -> RunView:
        """Return what the artifact shows; `status` is None right after the kickoff."""
        record = self.record
        failed = None if status is None or self.blind else status.current_task or self.task_seen
        return RunView(
            crew=self.crew.label,
            kickoff_id=self.kickoff_id,
            idempotency_key=self.idempotency_key,
            state=CrewState.PENDING if status is None else status.state,
            started_at=None if record is None else record.kicked_off_at,
            ended_at=None if record is None else record.ended_at,
            inputs=None if self.inputs is None else self.redact.tree(self.inputs),
            status=None if status is None else self.masked(status),
            show=self.show,
            secret_inputs=self.crew.secret_inputs,
            price=self.crew.price,
            notes=notes,
            reviews=reviews,
            failed_task=None if failed is None else self.redact(failed),
            attempt=attempt_of(record, self.crew.max_kickoffs),
            advice=self.advice or after_failure(self.crew.label, record, self.crew.max_kickoffs),
        )

    def shown_by(self) -> RunArtifact:
        """Return its artifact, whether or not it has been made."""
        if self.artifact is None:
            owner = None if self.record is None else self.record.flow_run_id
            self.artifact = RunArtifact(self.crew.label, self.kickoff_id, flow_run_id=owner)
        return self.artifact


_KEPT = 10_000
_WAITED_KEPT = 500
_waited: OrderedDict[tuple[str, str | None], OpenRun] = OrderedDict()
_recent: OrderedDict[tuple[str, str | None], OpenRun] = OrderedDict()
# By the flow run as well: who only waits for another flow run's run must not be taken for its owner.


def remember(run: OpenRun) -> None:
    """Keep an opened run at hand in this process, so that the wait after a kickoff need not ask for its record."""
    _recent[run.kickoff_id, flow_run_id()] = run
    _recent.move_to_end((run.kickoff_id, flow_run_id()))
    while len(_recent) > _KEPT:
        _recent.popitem(last=False)


def recall(crew: Crew, kickoff_id: str, *, take: bool = True) -> OpenRun | None:
    """Return what `remember` kept. The wait takes it: whoever comes later has to read what stands on the server."""
    key = kickoff_id, flow_run_id()
    run = _recent.get(key)
    if run is None or run.crew.url != crew.url:
        return None
    if take:
        _waited[key] = _recent.pop(key)
        while len(_waited) > _WAITED_KEPT:
            _waited.popitem(last=False)
    return run


def reopened(crew: Crew, kickoff_id: str, record: RunRecord | None) -> OpenRun:
    """Return a run with the record that was read of it, and with what no record has, where this process waited for it.

    That is its inputs, without which secrets could not be masked, and the user's own webhooks.
    """
    run = _waited.get((kickoff_id, flow_run_id()))
    if run is None or run.crew.url != crew.url:
        return OpenRun(crew, kickoff_id, record)
    hiding = crew.hiding(run.crew.secret_inputs, texts=run.crew.hidden)
    return OpenRun(hiding, kickoff_id, record, run.inputs, meta=run.meta, webhooks=run.webhooks)


M = TypeVar("M", bound=BaseModel)


def result_of(run: OpenRun, status: CrewStatus) -> CrewResult:
    """Return the result of a completed run; whatever else a status says is raised, never returned.

    Raises:
        CrewFailedError, CrewStoppedError, CrewLostError: How the run ended.
        CrewError: It has not ended.
    """
    if status.state is CrewState.COMPLETED:
        return status.result()
    raise failure(run, status.state, run.told(status.error))


def failure(run: OpenRun, state: CrewState | None, error: str | None) -> CrewError:
    """Return the error for a run that has no result; `error` is the crew's own as it may be told."""
    label, idempotency_key, kickoff_id = run.crew.label, run.idempotency_key, run.kickoff_id
    advice = run.advice or after_failure(label, run.record, run.crew.max_kickoffs)
    if state is CrewState.FAILED:
        return CrewFailedError(
            kickoff_id=kickoff_id, error=error or "", crew=label, idempotency_key=idempotency_key, advice=advice
        )
    if state is CrewState.STOPPED:
        return CrewStoppedError(kickoff_id=kickoff_id, crew=label, idempotency_key=idempotency_key, advice=advice)
    if state is CrewState.UNKNOWN:
        return CrewLostError(kickoff_id=kickoff_id, crew=label, idempotency_key=idempotency_key)
    return CrewError(
        f"Run {kickoff_id} of crew {label} has no result yet: it is {state}. Wait for it with wait_for_crew."
    )


def typed(result: CrewResult, output_type: type[M], *, run: OpenRun | None = None) -> CrewResult:
    """Return the result with its `data` as an instance of a pydantic model.

    Raises:
        OutputTypeError: Neither the structured result nor the text fits. Its message shows as much of the text as
            `run` may show; all of it is in its `output`.
    """
    source = result.data
    try:
        text = source is None
        data = output_type.model_validate_json(result.output) if text else output_type.model_validate(source)
    except ValidationError as error:
        # A validator's message may quote what it refused; its type does not.
        reason = "msg" if run is None or run.show == "full" else "type"
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'the text'}: {problem[reason]}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
    else:
        return result.model_copy(update={"data": data})
    shown = None
    if run is not None:
        problems = [run.redact(problem) for problem in problems]
        shown = run.redact(result.output) if run.show == "full" else "not shown"
    # Out here, since the validator's own error quotes the whole result and would come along as its context.
    refusal = OutputTypeError(
        kickoff_id=result.kickoff_id,
        output_type=output_type.__name__,
        output=result.output,
        problems=problems,
        shown=shown,
    )
    del result, source  # error reporters show the local variables of all frames
    raise refusal


async def find_run(crew: Crew, kickoff_id: str, idempotency_key: str | None = None, *, take: bool = True) -> OpenRun:
    """Return a run by its id, with its record where one is found. A Prefect API that is away leaves it without.

    `take`: what this process remembers of it is for the caller alone, who waits for its end and closes its record.
    """
    run = recall(crew, kickoff_id, take=take)
    if run is not None:
        return run
    records = PrefectRecords()
    try:
        if idempotency_key is None:
            record = await records.of_kickoff(kickoff_id)
        else:
            attempts = await records.attempts(idempotency_key)
            record = next((attempt for attempt in attempts if attempt.kickoff_id == kickoff_id), None)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("The record of run %s could not be read (%s): going on without it.", kickoff_id, error)
        record = None
    return reopened(crew, kickoff_id, record)


async def recorded_result(run: OpenRun, session: CrewSession) -> CrewResult:
    """Return the result of a run whose end is on record: from the record, else from the status call.

    Raises:
        CrewFailedError, CrewStoppedError: How it ended instead.
        CrewLostError: It completed, and the remote side has forgotten the result.
        CrewError: The status call failed.
    """
    record = run.record
    assert record is not None  # noqa: S101  the caller looked
    if record.state is not CrewState.COMPLETED:
        raise failure(run, record.state, record.error)
    if record.result is not None:
        return record.result.result(run.kickoff_id)
    return await _asked(run, session, last_state=str(record.state))


async def read_result(run: OpenRun) -> CrewResult:
    """Return the result of a run that has completed, by its record or by its status.

    Raises:
        CrewError: It has not completed; the message says where it stands.
    """
    async with CrewSession(run.crew, withhold=run.withholding()) as session:
        if run.record is not None and run.record.phase is RecordPhase.ENDED:
            return await recorded_result(run, session)
        return await _asked(run, session, last_state=None if run.record is None else "started")


async def _asked(run: OpenRun, session: CrewSession, *, last_state: str | None) -> CrewResult:
    status = await session.asked(lambda client: client.status(run.kickoff_id))
    if status.state is CrewState.UNKNOWN:
        raise CrewLostError(
            kickoff_id=run.kickoff_id, crew=run.crew.label, idempotency_key=run.idempotency_key, last_state=last_state
        )
    return result_of(run, status)
