"""How the server talks: the bodies of its answers in three dialects.

documented
    To the letter of the published contract: `{"status": "running" | "completed" | "error", …}`. What it leaves open
    (a run that waits for a person, or was stopped) is answered with the words that CrewAI's pages use.
union
    For strict clients in the field, which look for `state` or `status`, `result` as text, `result_json`, top-level
    `output` and `tasks`, `progress`, `last_step` and so on: everything at once.
live
    As CrewAI's hosted crews answer clients in the field: `state` and `result`, no progress, no times; errors as
    `{"detail": …}`; an unknown run is a 200 with the state NOT FOUND. `GET /inputs` says of each input what is known
    of it; the other two name the inputs, and which of them are required.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver.runs import Execution
from prefect_crew.states import CrewState

DialectName = Literal["documented", "union", "live"]
Body = tuple[int, dict[str, Any]]
"""An HTTP status and a JSON body."""

WAITING = "Pending Human Input"

_UPPER = {
    CrewState.PENDING: "PENDING",
    CrewState.RUNNING: "STARTED",
    CrewState.WAITING: "PENDING_HUMAN_INPUT",
    CrewState.COMPLETED: "SUCCESS",
    CrewState.FAILED: "FAILED",
    CrewState.STOPPED: "REVOKED",
}
_LOWER = {
    CrewState.PENDING: "running",  # the contract knows no pending
    CrewState.RUNNING: "running",
    CrewState.WAITING: WAITING,
    CrewState.COMPLETED: "completed",
    CrewState.FAILED: "error",
    CrewState.STOPPED: "stopped",
}


class Dialect(Protocol):
    """One way of answering."""

    @property
    def name(self) -> DialectName:
        """Return its name."""
        ...

    def inputs(self, inputs: list[CrewInput]) -> Any:
        """Return the body of `GET /inputs`."""
        ...

    def status(self, run: Execution) -> dict[str, Any]:
        """Return the body of the status call."""
        ...

    def unknown(self) -> Body:
        """Return what the status call says of a run that is not known."""
        ...

    def error(self, code: int, error: str, message: str, details: dict[str, Any] | None = None) -> Body:
        """Return an error's status and body."""
        ...


def dialect_named(name: str) -> Dialect:
    """Return the dialect of that name.

    Raises:
        ValueError: There is none.
    """
    try:
        return DIALECTS[name]
    except KeyError:
        raise ValueError(f"There is no dialect {name!r}. Dialects: {', '.join(DIALECTS)}.") from None


def cannot_stop(run: Execution) -> Body:
    """Return what `/stop` answers for a run that has ended; it was never published, and speaks no dialect."""
    return 400, {"detail": f"Cannot stop execution. Current state: {_UPPER[run.state]}"}


class _Documented:
    name: DialectName = "documented"

    def inputs(self, inputs: list[CrewInput]) -> Any:
        required = [item.name for item in inputs if item.required]
        return {"inputs": [item.name for item in inputs], "required_inputs": required}

    def status(self, run: Execution) -> dict[str, Any]:
        status = _LOWER[run.state]
        if run.state is CrewState.COMPLETED:
            result = {"output": run.output or "", "tasks": [documented_task(task) for task in run.tasks]}
            return {"status": status, "result": result, "execution_time": run.execution_time}
        if run.state is CrewState.FAILED:
            return {"status": status, "error": run.error or "", "execution_time": run.execution_time}
        if run.state is CrewState.STOPPED:
            return {"status": status, "execution_time": run.execution_time}
        return {"status": status, "current_task": _current(run) or "", "progress": _progress(run)}

    def unknown(self) -> Body:
        return self.error(404, "Execution not found", "No execution found with the given kickoff_id.")

    def error(self, code: int, error: str, message: str, details: dict[str, Any] | None = None) -> Body:
        body: dict[str, Any] = {"error": error, "message": message}
        return code, {**body, "details": details} if details else body


class _Union(_Documented):
    name: DialectName = "union"

    def status(self, run: Execution) -> dict[str, Any]:
        last = run.tasks[-1] if run.tasks else None
        step = run.last_step
        tasks = [{**documented_task(task), "name": task.name, "description": task.description} for task in run.tasks]
        return {
            "kickoff_id": run.id,
            "state": _UPPER[run.state],
            "status": _LOWER[run.state],
            "current_task": _current(run),
            "task_id": next(iter(run.questions), None),
            "task_output": next((question.output for question in run.questions.values()), None),
            "progress": _progress(run),
            "last_step": {"agent": step.agent, "type": step.kind, "content": step.content} if step else None,
            "last_executed_task": _last(last),
            "result": run.error if run.state is CrewState.FAILED else run.output,
            "result_json": run.data,
            "output": run.output,
            "tasks": tasks,
            "error": run.error,
            "execution_time": run.execution_time,
            "token_usage": run.usage.model_dump(exclude_none=True) if run.usage else None,
            "meta": run.meta,
        }


class _Live:
    name: DialectName = "live"

    def inputs(self, inputs: list[CrewInput]) -> Any:
        return {"inputs": [item.model_dump(exclude_none=True) for item in inputs]}

    def status(self, run: Execution) -> dict[str, Any]:
        body: dict[str, Any] = {"state": _UPPER[run.state]}
        if run.state is CrewState.COMPLETED:
            body |= {"result": run.output or "", "result_json": run.data}
        elif run.state is CrewState.FAILED:
            body |= {"status": run.error or "", "result": None}
        elif run.tasks:
            body["last_executed_task"] = _last(run.tasks[-1])
        return body

    def unknown(self) -> Body:
        return 200, {"state": "NOT FOUND"}

    def error(self, code: int, error: str, message: str, details: dict[str, Any] | None = None) -> Body:
        body: dict[str, Any] = {"detail": message}
        return code, {**body, **details} if details else body


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (_Documented(), _Union(), _Live())}


def documented_task(task: TaskResult) -> dict[str, Any]:
    """Return one task as `result.tasks` lists it."""
    return {
        "task_id": task.name,
        "output": task.output or "",
        "agent": task.agent,
        "execution_time": task.execution_time,
    }


def _current(run: Execution) -> str | None:
    return next(iter(run.questions), run.current_task)


def _progress(run: Execution) -> dict[str, int]:
    return {"completed_tasks": len(run.tasks), "total_tasks": run.total_tasks}


def _last(task: TaskResult | None) -> dict[str, Any] | None:
    if task is None:
        return None
    return {"name": task.name, "agent": task.agent, "description": task.description, "output": task.output}
