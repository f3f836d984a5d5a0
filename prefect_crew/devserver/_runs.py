"""The runs of one crew on the dev server: each with its state, tasks, questions and end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Protocol

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.client.webhooks import Webhooks
from prefect_crew.states import CrewState


class ProgramError(Exception):
    """The crew failed; the text is the error that its status answer shows."""


class ProgramNotFoundError(ValueError):
    """The crew to serve cannot be loaded. The text has the reason and the next step."""


class Answer(NamedTuple):
    """The answer of a person."""

    approve: bool
    feedback: str


@dataclass(frozen=True)
class Outcome:
    """The result of a completed run: its text, the structured result or None, and the usage or None."""

    output: str
    data: Any = None
    usage: TokenUsage | None = None


class Step(NamedTuple):
    """One thing that an agent did."""

    agent: str | None
    kind: str
    content: str
    tool: str | None
    task: str | None


class Question(NamedTuple):
    """A question to a person about one task. `uuid` is its own id, for servers that do not name the task."""

    task_id: str
    output: str
    answer: asyncio.Future[Answer]
    uuid: str


class Program(Protocol):
    """A crew that can be run many times at once. A Flow has an attribute `flow` that is true.

    A program with a method `definition`, which returns JSON values, is served at `GET /inspect`.
    """

    @property
    def name(self) -> str: ...

    def inputs(self) -> list[CrewInput]:
        """Return the inputs for `GET /inputs`. The server calls it for each request, so it must be cheap."""
        ...

    async def execute(self, run: Run) -> Outcome:
        """Run the crew once.

        A stop of the run cancels this coroutine (asyncio.CancelledError), which must not block the event loop.

        Raises:
            ProgramError: The crew failed.
        """
        ...


Listener = Callable[["Run", str, Any], None]
"""Called with the run, what happened, and a value: started None, task_started name, task_ended TaskResult, step Step,
waiting Question, completed None, failed None, stopped None."""
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(eq=False, repr=False)
class Run:
    """One run. The run's program reports to the run, and the server makes its answers from the run.

    Its methods must be called on the server's event loop; any thread may read it.

    Attributes:
        id: The kickoff id. In the response format "live" each answer of a person gives the run a new one.
        former_ids: The ids that it had before.
        targets: The webhooks; each `/resume` replaces them, also by none.
        planned: Names of all tasks, if the program set them.
        tasks: The results of the ended tasks.
        faults: The faults that concern this run, by name, with their values.
    """

    inputs: Mapping[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    meta: Any = None
    targets: Webhooks = field(default_factory=Webhooks)
    restore_from: str | None = None
    is_flow: bool = False
    former_ids: set[str] = field(default_factory=set[str], init=False)
    listener: Listener = lambda _run, _event, _value: None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC), init=False)
    planned: list[str] = field(default_factory=list[str], init=False)
    tasks: list[TaskResult] = field(default_factory=list[TaskResult], init=False)
    current_task: str | None = field(default=None, init=False)
    current_agent: str | None = field(default=None, init=False)
    last_step: Step | None = field(default=None, init=False)
    questions: dict[str, Question] = field(default_factory=dict[str, Question], init=False)
    output: str | None = field(default=None, init=False)
    data: Any = field(default=None, init=False)
    usage: TokenUsage | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)
    faults: dict[str, float] = field(default_factory=dict[str, float], init=False)
    task: asyncio.Task[None] | None = field(default=None, init=False)
    _state: CrewState = field(default=CrewState.PENDING, init=False)
    _status_calls: int = field(default=0, init=False)
    _began: float = field(default_factory=lambda: time.monotonic(), init=False)
    _seconds: float | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.state}>"

    @property
    def state(self) -> CrewState:
        """The state of the run."""
        return CrewState.WAITING if self._state is CrewState.RUNNING and self.questions else self._state

    @property
    def execution_time(self) -> float:
        """Seconds from the kickoff to the end, or until now."""
        return round(time.monotonic() - self._began, 3) if self._seconds is None else self._seconds

    # Called by the program

    def plan(self, tasks: list[str]) -> None:
        """Set the names of all tasks, so that progress has a total."""
        self.planned = list(tasks)

    def task_started(self, name: str, *, agent: str | None = None) -> None:
        """Report that a task begins."""
        if not self.state.ended:
            self.current_task, self.current_agent = name, agent
            self.listener(self, "task_started", name)

    def task_ended(self, task: TaskResult) -> None:
        """Report the result of a task."""
        if not self.state.ended:
            self.tasks.append(task)
            if task.name == self.current_task:
                self.current_task = None
            self.listener(self, "task_ended", task)

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        """Report a step of an agent."""
        if not self.state.ended:
            self.last_step = Step(agent, kind, content, tool, self.current_task)
            self.listener(self, "step", self.last_step)

    async def ask(self, *, task_id: str, output: str) -> Answer:
        """Wait until a person has answered; until then the run's state is "waiting". A run's end cancels this."""
        if self.state.ended:
            raise asyncio.CancelledError
        question = Question(task_id, output, asyncio.get_running_loop().create_future(), str(uuid.uuid4()))
        self.questions[question.uuid] = question
        self.listener(self, "waiting", question)
        try:
            return await question.answer
        finally:
            self.questions.pop(question.uuid, None)

    # Called by the server

    def deny_status(self) -> bool:
        """Count a status call. Return True if a fault lets it answer that the run is unknown."""
        self._status_calls += 1
        return (
            "forgotten" in self.faults
            or self._status_calls <= self.faults.get("early-404", 0.0)
            or time.monotonic() - self._began < self.faults.get("early-404-seconds", 0.0)
        )

    def answer(
        self, task_id: str, answer: Answer, targets: Webhooks | None = None
    ) -> Literal["resumed", "retrying", "completed"] | None:
        """Take a person's answer. Return the word for the answer of `/resume`, None if there is no such question.

        `task_id` is the task's, for its oldest question, or the question's own. `targets` replace the targets of
        webhooks; None keeps them.
        """
        question = next((one for one in self.questions.values() if task_id in (one.task_id, one.uuid)), None)
        if question is None:
            return None
        del self.questions[question.uuid]
        self.targets = self.targets if targets is None else targets
        question.answer.set_result(answer)
        if not answer.approve:
            return "retrying"
        return "completed" if self.planned and question.task_id == self.planned[-1] else "resumed"

    def begin(self) -> None:
        """Note that the program runs."""
        self._state = CrewState.RUNNING
        self.listener(self, "started", None)

    def end(self, state: CrewState, *, outcome: Outcome | None = None, error: str | None = None) -> None:
        """Close the run."""
        self._seconds = self.execution_time
        self.current_task = None
        for question in self.questions.values():
            question.answer.cancel()
        self.error = error
        if outcome is not None:
            self.output, self.data, self.usage = outcome.output, outcome.data, outcome.usage
        self._state = state  # last, since other threads read it first
        self.questions.clear()
        self.listener(self, str(state), None)
