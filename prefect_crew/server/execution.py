"""One run of the local crew server: its state, tasks, questions and end.

    pending -> running <-> waiting (for a person)
                  └-> completed | failed | stopped

It changes on the server's event loop only; other threads may read its attributes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from prefect_crew.api.models import CrewState, TaskResult, TokenUsage
from prefect_crew.server.hooks import Hooks
from prefect_crew.server.program import Answer, Outcome

__all__ = ["Execution", "Listener", "NotWaitingError", "Question", "Step", "nobody"]

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
