"""The three wordings of the dev server's answers.

- documented: To the letter of the published contract. For states that it leaves open (a run that waits for a person,
  or was stopped), the server uses the words of CrewAI's pages.
- union: All fields that strict clients look for, `state` and `status` together.
- live: As CrewAI's hosted crews answer: `state` and `result`, no progress, no times; errors as `{"detail": …}`; an
  unknown run is a 200 with the state NOT FOUND. `GET /inputs` describes each input.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver._runs import Run
from prefect_crew.states import CrewState

FormatName = Literal["documented", "union", "live"]

WORDS = {
    CrewState.PENDING: ("PENDING", "running"),  # the contract knows no pending
    CrewState.RUNNING: ("STARTED", "running"),
    CrewState.WAITING: ("PENDING_HUMAN_INPUT", "Pending Human Input"),
    CrewState.COMPLETED: ("SUCCESS", "completed"),
    CrewState.FAILED: ("FAILED", "error"),
    CrewState.STOPPED: ("REVOKED", "stopped"),
}
"""The `state` and the `status` of each state."""


class ResponseFormat:
    """The format "documented", which the other two change."""

    def inputs(self, inputs: list[CrewInput]) -> dict[str, Any]:
        """Return the body of `GET /inputs`."""
        required = [item.name for item in inputs if item.required]
        return {"inputs": [item.name for item in inputs], "required_inputs": required}

    def status(self, run: Run) -> dict[str, Any]:
        """Return the body of the status call."""
        body: dict[str, Any] = {"status": WORDS[run.state][1]}
        if not run.state.ended:
            return {**body, "current_task": _current(run) or "", "progress": _progress(run)}
        if run.state is CrewState.COMPLETED:
            body["result"] = documented_result(run)
        if run.state is CrewState.FAILED:
            body["error"] = run.error or ""
        return {**body, "execution_time": run.execution_time}

    def unknown(self) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of the status call for an unknown run."""
        return 404, self.error("Execution not found", "No execution found with the given kickoff_id.")

    def error(self, error: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the body of an error."""
        return {"error": error, "message": message, **({"details": details} if details else {})}


class _Union(ResponseFormat):
    def status(self, run: Run) -> dict[str, Any]:
        state, status = WORDS[run.state]
        step = run.last_step
        question = next(iter(run.questions.values()), None)
        return {
            "kickoff_id": run.id,
            "state": state,
            "status": status,
            "current_task": _current(run),
            "task_id": question.task_id if question else None,
            "task_output": question.output if question else None,
            "progress": _progress(run),
            "last_step": {"agent": step.agent, "type": step.kind, "content": step.content} if step else None,
            "last_executed_task": _described(run.tasks[-1]) if run.tasks else None,
            "result": run.error if run.state is CrewState.FAILED else run.output,
            "result_json": run.data,
            "output": run.output,
            "tasks": [documented_task(task) | _described(task) for task in run.tasks],
            "error": run.error,
            "execution_time": run.execution_time,
            "token_usage": run.usage.model_dump(exclude_none=True) if run.usage else None,
            "meta": run.meta,
        }


class _Live(ResponseFormat):
    def inputs(self, inputs: list[CrewInput]) -> dict[str, Any]:
        return {"inputs": [item.model_dump(exclude_none=True) for item in inputs]}

    def status(self, run: Run) -> dict[str, Any]:
        body: dict[str, Any] = {"state": WORDS[run.state][0]}
        if run.state is CrewState.FAILED:
            return {**body, "status": run.error or "", "result": None}
        if run.state is CrewState.COMPLETED:
            body |= {"result": run.output or "", "result_json": run.data}
        # Also of a completed run: a client of hosted crews reads the output there.
        return {**body, "last_executed_task": _described(run.tasks[-1])} if run.tasks else body

    def unknown(self) -> tuple[int, dict[str, Any]]:
        return 200, {"state": "NOT FOUND"}

    def error(self, error: str, message: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"detail": message, **(details or {})}


FORMATS: dict[str, ResponseFormat] = {"documented": ResponseFormat(), "union": _Union(), "live": _Live()}


def documented_task(task: TaskResult) -> dict[str, Any]:
    """Return one task as `result.tasks` lists it."""
    about = {"agent": task.agent, "execution_time": task.execution_time}
    return {"task_id": task.name, "output": task.output or "", **about}


def documented_result(run: Run) -> dict[str, Any]:
    """Return the `result` of a completed run."""
    return {"output": run.output or "", "tasks": [documented_task(task) for task in run.tasks]}


def _described(task: TaskResult) -> dict[str, Any]:
    return {"name": task.name, "agent": task.agent, "description": task.description, "output": task.output or ""}


def _current(run: Run) -> str | None:
    return next(iter(run.questions), run.current_task)


def _progress(run: Run) -> dict[str, int]:
    total = max(len(run.planned), len(run.tasks) + (run.current_task is not None))
    return {"completed_tasks": len(run.tasks), "total_tasks": total}
