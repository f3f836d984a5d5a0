"""One run on the dev server: its state, tasks, questions and end."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver._json import to_json
from prefect_crew.states import CrewState


class Journal:
    """The journal at `path`, which is created where it is missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def check(self) -> None:
        """See that the file can be read and written, creating it where it is missing.

        Raises:
            OSError: It cannot.
        """
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))

    def read(self) -> list[dict[str, Any]]:
        """Return all whole entries, oldest first."""
        if not self.path.exists():
            return []
        entries: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that the crash cut off
            if isinstance(entry, dict) and "id" in entry:
                entries.append(entry)  # pyright: ignore[reportUnknownArgumentType]
        return entries

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry and return once it is on the disk."""
        if self._file is None:
            self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # a line that a crash cut off must not swallow this one
        os.write(self._file, to_json(entry) + b"\n")
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; appending opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class HooksError(ValueError):
    """The request's webhooks make no sense; the text says which one and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Authentication(_Part):
    """How a webhook proves where it comes from: a bearer token, or a user name and password."""

    strategy: Literal["bearer", "basic"]
    token: SecretStr | None = None
    username: str | None = None
    password: SecretStr | None = None

    @model_validator(mode="after")
    def _complete(self) -> Authentication:
        if self.strategy == "bearer" and self.token is None:
            raise ValueError("a bearer strategy needs a token")
        if self.strategy == "basic" and (self.username is None or self.password is None):
            raise ValueError("a basic strategy needs a username and a password")
        return self


class Target(_Part):
    """One URL with its authentication, if it has any."""

    url: str = Field(pattern=r"^https?://", repr=False)
    authentication: Authentication | None = None


class Stream(Target):
    """One event stream. An empty `events` means all of them; `realtime` sends each by itself instead of in batches."""

    events: list[str] = Field(default_factory=list[str])
    realtime: bool = False


class Hooks(_Part):
    """All targets of one run. URLs stay out of the repr: what protects their receivers may stand in them."""

    task: str | None = Field(default=None, alias="taskWebhookUrl", pattern=r"^https?://", repr=False)
    step: str | None = Field(default=None, alias="stepWebhookUrl", pattern=r"^https?://", repr=False)
    crew: str | None = Field(default=None, alias="crewWebhookUrl", pattern=r"^https?://", repr=False)
    human: Target | None = Field(default=None, alias="humanInputWebhook")
    streams: list[Stream] = Field(default_factory=list[Stream], alias="webhooks")
    _asked: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])

    @classmethod
    def of(cls, body: dict[str, Any]) -> Hooks:
        """Read the webhooks of a `/kickoff` or `/resume` body.

        Raises:
            HooksError: A target is not an http(s) URL, or its authentication is incomplete.
        """
        fields = {name: body[name] for name in _FIELDS if body.get(name) not in (None, [])}
        if isinstance(fields.get("webhooks"), dict):
            fields["webhooks"] = [fields["webhooks"]]
        try:
            hooks = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise HooksError(f"{where}: {first['msg']}") from None
        hooks._asked = fields  # noqa: SLF001 - a model's private attribute can only be set once it exists
        return hooks

    def as_body(self) -> dict[str, Any]:
        """Return the fields as the request carried them, secrets in clear: for the journal only."""
        return dict(self._asked)


_FIELDS = ("taskWebhookUrl", "stepWebhookUrl", "crewWebhookUrl", "humanInputWebhook", "webhooks")


class ProgramError(Exception):
    """The crew failed; the text is what its status answer will say."""


class ProgramNotFoundError(ValueError):
    """What was asked for cannot be served; the text says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a person answered through `/resume`."""

    approve: bool
    feedback: str


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the text, the structured result where there is one, usage where it is known."""

    output: str
    data: Any = None
    usage: TokenUsage | None = None
    tasks: list[TaskResult] = field(default_factory=list[TaskResult])
    """All tasks, where the program knows them better than its `task_ended` calls told. Empty: those count."""


class Run(Protocol):
    """One kickoff. Its methods must be called on the server's event loop unless they say otherwise."""

    @property
    def id(self) -> str:
        """The kickoff id."""
        ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the kickoff gave."""
        ...

    @property
    def restore_from(self) -> str | None:
        """The state that a Flow is to start from, as the kickoff's `restoreFromStateId` names it."""
        ...

    @property
    def stop_requested(self) -> bool:
        """True once `/stop` was accepted. Safe to read from any thread."""
        ...

    def plan(self, tasks: list[str]) -> None:
        """Name the tasks that are to come, so that progress has a total."""
        ...

    def task_started(self, name: str, *, agent: str | None = None, description: str | None = None) -> None:
        """Say that a task begins."""
        ...

    def task_ended(self, task: TaskResult) -> None:
        """Say what a task gave."""
        ...

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        """Say what an agent did."""
        ...

    async def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person: the state becomes "waits for a person" until `/resume` answers."""
        ...


class Program(Protocol):
    """A crew that can be run many times at once. One that is a Flow says so by an attribute `flow` that is true."""

    @property
    def name(self) -> str:
        """The crew's name."""
        ...

    def inputs(self) -> list[CrewInput]:
        """Return what `GET /inputs` says. Called for each request, so it must be cheap."""
        ...

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once.

        It is cancelled (asyncio.CancelledError) when the run is stopped, and must not block the event loop.

        Raises:
            ProgramError: The crew failed.
        """
        ...


Listener = Callable[["Execution", str, Any], None]
"""Called with the run, what happened, and a value that depends on it.

started None · task_started name · task_ended TaskResult · step Step · waiting Question · completed None · failed None ·
stopped None
"""


class NotWaitingError(Exception):
    """The run does not wait for a person, or not for this task."""


@dataclass(frozen=True)
class Step:
    """One thing that an agent did."""

    agent: str | None
    kind: str
    content: str
    tool: str | None
    task: str | None


@dataclass(frozen=True)
class Question:
    """What a person is asked. `round` counts from 1 for each task."""

    task_id: str
    output: str
    round: int
    answer: asyncio.Future[Answer]


class Execution:
    """One run. It is the `Run` that a program sees, and what the dialects read.

    Attributes:
        id, inputs, meta, restore_from, hooks: What the kickoff brought; `hooks` is what the last `/resume` left of it.
        flow: Whether it runs a Flow.
        state: One of CrewState, never UNKNOWN.
        planned: Names of all tasks, where the program said so.
        tasks: What the ended tasks gave.
        output, data, usage, error: The end, once there is one.
        stuck: Never gets anywhere, until it is stopped.
        forgotten, hidden_polls, hidden_until: Faults; whether and for how long the status call denies the run.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the crew API's word
        inputs: Mapping[str, Any],
        *,
        meta: Any = None,
        hooks: Hooks | None = None,
        restore_from: str | None = None,
        flow: bool = False,
    ) -> None:
        self._id = id
        self._inputs = dict(inputs)
        self.meta = meta
        self.restore_from = restore_from
        self.flow = flow
        self.hooks = hooks or Hooks()
        self.state = CrewState.PENDING
        self.created_at = datetime.now(UTC)
        self.planned: list[str] = []
        self.tasks: list[TaskResult] = []
        self.current_task: str | None = None
        self.current_agent: str | None = None
        self.last_step: Step | None = None
        self.questions: dict[str, Question] = {}
        self.output: str | None = None
        self.data: Any = None
        self.usage: TokenUsage | None = None
        self.error: str | None = None
        self.base_url = ""
        self.stuck = False
        self.forgotten = False
        self.hidden_polls = 0
        self.hidden_until = 0.0
        self._stop_requested = False
        self._rounds: dict[str, int] = {}
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._listener: Listener = nobody

    def __repr__(self) -> str:
        return f"<Execution {self.id} {self.state}>"

    @property
    def id(self) -> str:
        """The kickoff id."""
        return self._id

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the kickoff gave."""
        return self._inputs

    @property
    def stop_requested(self) -> bool:
        """True once `/stop` was accepted."""
        return self._stop_requested

    @property
    def execution_time(self) -> float:
        """Seconds from the kickoff to the end, or until now."""
        return round(time.monotonic() - self._began, 3) if self._seconds is None else self._seconds

    @property
    def total_tasks(self) -> int:
        """How many tasks there are, as far as is known."""
        return max(len(self.planned), len(self.tasks) + (self.current_task is not None))

    # What the program says

    def plan(self, tasks: list[str]) -> None:
        """Name the tasks that are to come."""
        self.planned = list(tasks)

    def task_started(self, name: str, *, agent: str | None = None, description: str | None = None) -> None:
        """A task begins."""
        if self.state.ended:
            return
        self.current_task, self.current_agent = name, agent
        self._listener(self, "task_started", name)

    def task_ended(self, task: TaskResult) -> None:
        """A task has given its result."""
        if self.state.ended:
            return
        self.tasks.append(task)
        if task.name == self.current_task:
            self.current_task = None
        self._listener(self, "task_ended", task)

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        """An agent did something."""
        if self.state.ended:
            return
        self.last_step = Step(agent, kind, content, tool, self.current_task)
        self._listener(self, "step", self.last_step)

    async def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait for a person's answer; each question about one task is a round of its own."""
        round_ = self._rounds[task_id] = self._rounds.get(task_id, 0) + 1
        question = Question(task_id, output, round_, asyncio.get_running_loop().create_future())
        self.questions[task_id] = question
        if not self.state.ended:
            self.state = CrewState.WAITING
            self._listener(self, "waiting", question)
        try:
            return await question.answer
        finally:
            self._close(question)

    # What the server does

    def answer(self, task_id: str, answer: Answer, hooks: Hooks) -> Literal["resumed", "retrying", "completed"]:
        """Give a person's answer; return the word that `/resume` answers with.

        The webhooks of the kickoff are forgotten: those of the answer count from here on, also when it has none.

        Raises:
            NotWaitingError: Nobody is asked anything, or not about that task.
        """
        question = self.questions.get(task_id)
        if self.state is not CrewState.WAITING or question is None:
            raise NotWaitingError(self.id)
        self.hooks = hooks
        self._close(question)
        question.answer.set_result(answer)
        if not answer.approve:
            return "retrying"
        return "completed" if self.planned and question.task_id == self.planned[-1] else "resumed"

    def _close(self, question: Question) -> None:
        if self.questions.get(question.task_id) is question:
            del self.questions[question.task_id]
        if self.state is CrewState.WAITING and not self.questions:
            self.state = CrewState.RUNNING

    def begin(self, listener: Listener) -> None:
        """Go from pending to running."""
        self.state = CrewState.RUNNING
        self._listener = listener
        listener(self, "started", None)

    def end(self, state: CrewState, *, outcome: Outcome | None = None, error: str | None = None) -> None:
        """Close the run; a run that has ended stays as it is."""
        if self.state.ended:
            return
        self._seconds = round(time.monotonic() - self._began, 3)
        self.current_task = None
        self.questions.clear()
        self.error = error
        if outcome is not None:
            self.output, self.data, self.usage = outcome.output, outcome.data, outcome.usage
            self.tasks = list(outcome.tasks) or self.tasks
        self._stop_requested = self._stop_requested or state is CrewState.STOPPED
        self.state = state  # last, since other threads read it first

    def as_entry(self) -> dict[str, Any]:
        """Return the end of the run as the journal keeps it."""
        return {
            "event": "ended",
            "id": self.id,
            "state": str(self.state),
            "planned": self.planned,
            "output": self.output,
            "data": self.data,
            "tasks": [task.model_dump(mode="json") for task in self.tasks],
            "usage": self.usage.model_dump() if self.usage else None,
            "error": self.error,
            "seconds": self._seconds,
        }

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Become what the journal's last entry says."""
        self.output, self.data, self.error = entry.get("output"), entry.get("data"), entry.get("error")
        self.tasks = [TaskResult.model_validate(task) for task in cast("list[Any]", entry.get("tasks") or [])]
        self.usage = TokenUsage.model_validate(entry["usage"]) if entry.get("usage") else None
        self.planned = list(cast("list[str]", entry.get("planned") or []))
        self._seconds = entry.get("seconds")
        self.state = CrewState(entry["state"])


def nobody(execution: Execution, what: str, value: Any) -> None:
    """Listen to nothing."""
