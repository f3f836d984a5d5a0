"""The two wordings of the dev server's answers.

- documented: To the letter of the published contract. For states that it leaves open (a run that waits for a person,
  or was stopped), the server uses the words of CrewAI's pages.
- live: As crews on AMP answered when CrewAI's engineers tested them. A crew that waits for a person is not shown: only
  its webhook tells of the question, and the answer moves the run to a new id. A Flow that waits is PAUSED.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

from pydantic import ValidationError

from prefect_crew._text import problems_of
from prefect_crew.client.models import TaskResult, TokenUsage
from prefect_crew.devserver._runs import Program, Question, Run
from prefect_crew.states import CrewState

FormatName = Literal["documented", "live"]
Refusal = tuple[int, Any]
"""The HTTP status and the body of an error."""

WORDS = {
    CrewState.PENDING: ("PENDING", "running"),  # the contract knows no pending
    CrewState.RUNNING: ("RUNNING", "running"),
    CrewState.WAITING: ("PAUSED", "Pending Human Input"),
    CrewState.COMPLETED: ("SUCCESS", "completed"),
    CrewState.FAILED: ("FAILED", "error"),
    CrewState.STOPPED: ("REVOKED", "stopped"),
}
"""The words for each state: of "live" in `state`, of "documented" in `status`."""


class Documented:
    """The format "documented"."""

    is_live: ClassVar[bool] = False

    def inputs(self, program: Program) -> dict[str, Any]:
        """Return the body of `GET /inputs`."""
        inputs = program.inputs()
        required = [item.name for item in inputs if item.required]
        return {"inputs": [item.name for item in inputs], "required_inputs": required}

    def status(self, run: Run) -> dict[str, Any]:
        """Return the body of the status call."""
        body: dict[str, Any] = {"status": WORDS[run.state][1]}
        question = next(iter(run.questions.values()), None)
        if not run.state.ended:
            total = max(len(run.planned), len(run.tasks) + (run.current_task is not None))
            progress = {"completed_tasks": len(run.tasks), "total_tasks": total}
            body |= {"current_task": question.task_id if question else run.current_task or "", "progress": progress}
            return body | {"task_output": question.output} if question else body
        if run.state is CrewState.COMPLETED:
            body["result"] = {"output": run.output or "", "tasks": [_task(task) for task in run.tasks]}
        if run.state is CrewState.FAILED:
            body["error"] = run.error or ""
        return {**body, "execution_time": run.execution_time}

    def question_id(self, question: Question) -> str:
        """Return the `task_id` of a question in its webhook and its answer."""
        return question.task_id

    def unknown(self) -> Refusal:
        """Return the answer about a run that is not there."""
        return 404, self.error("Execution not found", "No execution found with the given id.")

    def unauthorized(self, *, has_token: bool) -> dict[str, Any]:
        """Return the body of a 401, for a wrong token and for none."""
        return self.error(
            "Unauthorized", "The bearer token is missing or wrong. Send the header 'Authorization: Bearer TOKEN'."
        )

    def missing(self, names: list[str]) -> Refusal:
        """Return the answer to a kickoff that lacks required inputs."""
        message = f"Missing required inputs: {', '.join(names)}"
        return 422, {**self.error("Validation error", message), "details": {"missing_inputs": names}}

    def invalid(self, error: ValidationError) -> Refusal:
        """Return the answer to a body that cannot be read."""
        return 400, self.error("Invalid request", problems_of(error)[0])

    def error(self, error: str, message: str) -> dict[str, Any]:
        """Return the body of another error."""
        return {"error": error, "message": message}


class Live(Documented):
    """The format "live"."""

    is_live: ClassVar[bool] = True

    def inputs(self, program: Program) -> dict[str, Any]:
        return {"inputs": [item.name for item in program.inputs()]}

    def status(self, run: Run) -> dict[str, Any]:
        if run.state is CrewState.WAITING and not run.is_flow:
            return self.unknown()[1]
        state, step, message = WORDS[run.state][0], run.last_step, None
        if run.state is CrewState.RUNNING:
            state = "RUNNING" if run.current_task or run.tasks else "STARTED"
            message = "Task is Running"
        total = None if run.is_flow else max(len(run.planned), len(run.tasks) + (run.current_task is not None))
        progress = {
            "unit": "step" if run.is_flow else "task",
            "completed": len(run.tasks),
            "total": total,
            "remaining": None if total is None else total - len(run.tasks),
            "current": run.current_task,
        }
        return {
            "state": state,
            "status": run.error if run.state is CrewState.FAILED else message,
            "result": run.output,
            "result_json": run.data,
            "usage_metrics": usage_counts(run.usage),
            "progress": None if run.state in (CrewState.PENDING, CrewState.FAILED) else progress,
            "last_step": {"agent": step.agent, "type": step.kind, "content": step.content} if step else None,
            "last_executed_task": task_report(run, run.tasks[-1]) if run.tasks and not run.is_flow else None,
        }

    def question_id(self, question: Question) -> str:
        return question.uuid

    def unknown(self) -> Refusal:
        names = ("result", "result_json", "usage_metrics", "progress", "last_step", "last_executed_task")
        message = "Task not found or Invalid kickoff id"
        return 200, {"state": "NOT FOUND", "status": message, **dict.fromkeys(names)}

    def unauthorized(self, *, has_token: bool) -> dict[str, Any]:
        message = "Invalid or missing authentication credentials" if has_token else "Not authenticated"
        return self.error("", message)

    def missing(self, names: list[str]) -> Refusal:
        return 422, self.error("", f"Missing inputs: {', '.join(names)}")

    def invalid(self, error: ValidationError) -> Refusal:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if any(problem["type"] == "json_invalid" for problem in problems):
            return 500, "Internal Server Error"
        return 422, {"detail": [{**problem, "loc": ["body", *problem["loc"]]} for problem in problems]}

    def error(self, error: str, message: str) -> dict[str, Any]:
        return {"detail": message}


FORMATS: dict[str, Documented] = {"documented": Documented(), "live": Live()}


def usage_counts(usage: TokenUsage | None) -> dict[str, int] | None:
    """Return the counts that a run reports."""
    return usage.model_dump(exclude_none=True) if usage else None


def task_report(run: Run, task: TaskResult) -> dict[str, Any]:
    """Return a task as its webhook and `last_executed_task` describe it."""
    words, raw = (task.output or "").split(), cast("dict[str, Any]", task.raw or {})
    return {
        "description": task.description or "",
        "name": task.name,
        "expected_output": raw.get("expected_output", ""),
        "summary": " ".join(words[:10]) + ("..." if len(words) > 10 else ""),
        "agent": task.agent,
        "output": task.output or "",
        "output_json": task.data,
        "kickoff_id": run.id,
        "meta": run.meta,
    }


def _task(task: TaskResult) -> dict[str, Any]:
    about = {"agent": task.agent, "execution_time": task.execution_time}
    return {"task_id": task.name, "output": task.output or "", **about}
