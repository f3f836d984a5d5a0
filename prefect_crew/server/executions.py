"""The runs of the local crew server: their states, tasks, questions and ends.

    pending -> running <-> waiting (for a person)
                  └-> completed | failed | stopped

Everything here happens on the server's event loop. Other threads may read the attributes of an `Execution`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from prefect_crew.api.models import CrewState, TaskResult, TokenUsage
from prefect_crew.server.hooks import Hooks
from prefect_crew.server.journal import Journal
from prefect_crew.server.program import Answer, Outcome, Program, ProgramError

__all__ = ["Execution", "Executions", "Listener", "NotWaitingError", "Question", "Step", "StoppedTooLateError"]

Listener = Callable[["Execution", str, Any], None]
"""Called with the run, what happened, and a value that depends on it.

started None · task_started name · task_ended TaskResult · step Step · waiting Question · completed None · failed None ·
stopped None
"""


class NotWaitingError(Exception):
    """The run does not wait for a person, or not for this task."""


class StoppedTooLateError(Exception):
    """The run has already ended."""


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
        id, inputs, meta, hooks: What the kickoff brought; `hooks` is what the last `/resume` left of it.
        state: One of CrewState, never UNKNOWN.
        planned: Names of all tasks, where the program said so.
        tasks: What the ended tasks gave.
        output, data, usage, error: The end, once there is one.
        stuck: Never gets anywhere, until it is stopped.
        forgotten, hidden_polls, hidden_until: Faults; whether and for how long the status call denies the run.
    """

    def __init__(self, id: str, inputs: Mapping[str, Any], *, meta: Any = None, hooks: Hooks | None = None) -> None:  # noqa: A002 - the crew API's word
        self._id = id
        self._inputs = dict(inputs)
        self.meta = meta
        self.hooks = hooks or Hooks()
        self.state = CrewState.PENDING
        self.created_at = datetime.now(timezone.utc)
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
        self.stuck = False
        self.forgotten = False
        self.hidden_polls = 0
        self.hidden_until = 0.0
        self._stop_requested = False
        self._rounds: dict[str, int] = {}
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._listener: Listener = _nobody

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

    def answer(self, task_id: str | None, answer: Answer, hooks: Hooks) -> Literal["resumed", "retrying", "completed"]:
        """Give a person's answer; return the word that `/resume` answers with.

        The webhooks of the kickoff are forgotten: those of the answer count from here on, also when it has none.

        Raises:
            NotWaitingError: Nobody is asked anything, or not about that task.
        """
        question = next(iter(self.questions.values()), None) if task_id is None else self.questions.get(task_id)
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
        self.tasks = [TaskResult.model_validate(task) for task in entry.get("tasks") or []]
        self.usage = TokenUsage.model_validate(entry["usage"]) if entry.get("usage") else None
        self._seconds = entry.get("seconds")
        self.state = CrewState(entry["state"])


def _nobody(execution: Execution, what: str, value: Any) -> None:
    """Listen to nothing."""


class Executions:
    """All runs of one program.

    Args:
        program: The crew.
        max_runs: At most this many run at once; later ones are pending. None: no limit.
        journal: Where to remember them, so that `recover` finds them again.
        on_crash: What becomes of runs that were in flight when the journal ends: "rerun" starts them again under
            their ids, "lose" forgets them.
        new_id: Makes the id of a run; a UUID by default.
    """

    def __init__(
        self,
        program: Program,
        *,
        listener: Listener = _nobody,
        max_runs: int | None = None,
        journal: Journal | None = None,
        on_crash: Literal["rerun", "lose"] = "rerun",
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.program = program
        self._listener = listener
        self._gate = asyncio.Semaphore(max_runs) if max_runs else contextlib.nullcontext()
        self._journal = journal
        self._on_crash = on_crash
        self._new_id = new_id or _uuid
        self._runs: dict[str, Execution] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def __iter__(self) -> Iterator[Execution]:
        return iter(list(self._runs.values()))

    def get(self, id: str) -> Execution | None:  # noqa: A002 - the crew API's word
        """Return the run, whatever its faults hide from clients, or None."""
        return self._runs.get(id)

    def start(
        self, inputs: Mapping[str, Any], *, meta: Any = None, hooks: Hooks | None = None, stuck: bool = False
    ) -> Execution:
        """Accept a run: it is in the journal when this returns, and runs by itself from then on."""
        execution = Execution(self._new_id(), inputs, meta=meta, hooks=hooks)
        execution.stuck = stuck
        if self._journal:
            self._journal.append(
                {
                    "event": "accepted",
                    "id": execution.id,
                    "crew": self.program.name,
                    "at": execution.created_at.isoformat(),
                    "inputs": dict(inputs),
                    "meta": meta,
                    "hooks": execution.hooks.as_body(),
                }
            )
        self._launch(execution)
        return execution

    def stop(self, execution: Execution) -> None:
        """Stop a run for good.

        Raises:
            StoppedTooLateError: It has already ended.
        """
        if execution.state.ended:
            raise StoppedTooLateError(execution.id)
        self._end(execution, "stopped", CrewState.STOPPED)
        if task := self._tasks.get(execution.id):
            task.cancel()

    def recover(self) -> None:
        """Read the journal: ended runs are known again, and those in flight start again, or are lost."""
        for entry in self._journal.read() if self._journal else []:
            if entry["event"] == "accepted" and entry["crew"] == self.program.name:
                hooks = Hooks.of(entry.get("hooks") or {})
                self._runs[entry["id"]] = Execution(entry["id"], entry["inputs"], meta=entry.get("meta"), hooks=hooks)
            elif entry["event"] == "ended" and entry["id"] in self._runs:
                self._runs[entry["id"]].restore(entry)
        for execution in self:
            if execution.state.ended:
                continue
            if self._on_crash == "lose":
                execution.forgotten = True
            else:
                self._launch(execution)

    def abandon(self) -> None:
        """Cancel what runs, without a word to the journal: to it, this is as good as a crash."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()

    async def close(self) -> None:
        """Abandon what runs, and wait until it has ended."""
        self.abandon()
        tasks = list(self._tasks.values())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._journal:
            self._journal.close()

    def _launch(self, execution: Execution) -> None:
        self._runs[execution.id] = execution
        task = asyncio.create_task(self._run(execution), name=f"crew run {execution.id}")
        self._tasks[execution.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(execution.id, None))

    async def _run(self, execution: Execution) -> None:
        try:
            async with self._gate:
                execution.begin(self._listener)
                if execution.stuck:
                    await asyncio.get_running_loop().create_future()
                outcome = await self.program.execute(execution)
        except asyncio.CancelledError:
            if self._closed or execution.stop_requested:
                raise
            self._end(execution, "failed", CrewState.FAILED, error="the crew was cancelled from within")
        except ProgramError as error:
            self._end(execution, "failed", CrewState.FAILED, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever a crew raises is a failed run, never a broken server
            self._end(execution, "failed", CrewState.FAILED, error=f"{type(error).__name__}: {error}")
        else:
            self._end(execution, "completed", CrewState.COMPLETED, outcome=outcome)

    def _end(
        self,
        execution: Execution,
        what: str,
        state: CrewState,
        *,
        outcome: Outcome | None = None,
        error: str | None = None,
    ) -> None:
        if execution.state.ended or self._closed:
            return
        execution.end(state, outcome=outcome, error=error)
        if self._journal:
            self._journal.append(execution.as_entry())
        self._listener(execution, what, None)


def _uuid() -> str:
    return str(uuid.uuid4())
