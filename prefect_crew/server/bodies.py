"""Bodies of the webhooks, in the two generations that the published pages show; pure.

first
    task: kickoff_id, task_id, status, output, agent, execution_time · step: kickoff_id, task_id, agent, step_type,
    content · crew: kickoff_id, status, result {output, tasks}, execution_time, meta · human: execution_id, task_id,
    task_output, meta
later
    task: description, name, expected_output, summary, agent, output, output_json, kickoff_id, meta · step: prompt,
    thought, tool, tool_input, result, kickoff_id, meta · crew: kickoff_id, result (text), result_json, token_usage,
    meta · human: kickoff_id, task_id, output, meta

Event streams are the same in both: `{"events": [{id, execution_id, timestamp, type, data}]}`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast

from prefect_crew.api.models import TaskResult
from prefect_crew.server.dialects import documented_task
from prefect_crew.server.execution import Execution, Question, Step

__all__ = ["Generation", "crew_body", "human_body", "step_body", "stream_event", "stream_types", "task_body"]

Generation = Literal["first", "later"]


def task_body(run: Execution, task: TaskResult, generation: Generation) -> dict[str, Any]:
    """Return what the task webhook carries."""
    if generation == "first":
        return {"kickoff_id": run.id, "status": "completed", **documented_task(task)}
    raw: Any = task.raw
    known: Mapping[str, Any] = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
    output = task.output or ""
    return {
        "description": task.description or "",
        "name": task.name,
        "expected_output": known.get("expected_output", ""),
        "summary": " ".join(output.split()[:10]) + ("..." if len(output.split()) > 10 else ""),
        "agent": task.agent,
        "output": output,
        "output_json": task.data,
        "kickoff_id": run.id,
        "meta": run.meta,
    }


def step_body(run: Execution, step: Step, generation: Generation) -> dict[str, Any]:
    """Return what the step webhook carries."""
    if generation == "first":
        kind = {"step_type": step.kind, "content": step.content}
        return {"kickoff_id": run.id, "task_id": step.task, "agent": step.agent, **kind}
    said = {"thought": "", "result": step.content} if step.tool else {"thought": step.content, "result": ""}
    asked = {"prompt": f"{step.task or 'task'} ({step.agent or 'agent'})", "tool": step.tool or "", "tool_input": ""}
    return {**asked, **said, "kickoff_id": run.id, "meta": run.meta}


def crew_body(run: Execution, generation: Generation) -> dict[str, Any]:
    """Return what the crew webhook carries; it is sent for completed runs only, since no failure body is documented."""
    if generation == "first":
        result = {"output": run.output or "", "tasks": [documented_task(task) for task in run.tasks]}
        time = {"execution_time": run.execution_time}
        return {"kickoff_id": run.id, "status": "completed", "result": result, **time, "meta": run.meta}
    usage = run.usage.model_dump(exclude_none=True) if run.usage else None
    result = {"result": run.output or "", "result_json": run.data, "token_usage": usage}
    return {"kickoff_id": run.id, **result, "meta": run.meta}


def human_body(run: Execution, question: Question, generation: Generation) -> dict[str, Any]:
    """Return what the human-input webhook carries."""
    if generation == "first":
        asked = {"execution_id": run.id, "task_id": question.task_id, "task_output": question.output}
    else:
        asked = {"kickoff_id": run.id, "task_id": question.task_id, "output": question.output}
    return {**asked, "meta": run.meta}


def stream_types(run: Execution, what: str) -> tuple[str, ...]:
    """Return the types of CrewAI's events that tell of something that `execution.Listener` is told."""
    return (*_TYPES.get(what, ()), *(_FLOW_TYPES.get(what, ()) if run.flow else ()))


def stream_event(run: Execution, type_: str, value: Any) -> dict[str, Any]:
    """Return one event of a stream."""
    return {
        "id": str(uuid.uuid4()),
        "execution_id": run.id,
        "timestamp": datetime.now(UTC).isoformat(),
        "type": type_,
        "data": {"meta": run.meta, **_data(run, type_, value)},
    }


_TYPES = {
    "started": ("crew_kickoff_started",),
    "task_started": ("task_started", "agent_execution_started"),
    "step": ("agent_logs_execution",),
    "task_ended": ("agent_execution_completed", "task_completed"),
    "waiting": ("human_feedback_requested",),
    "completed": ("crew_kickoff_completed",),
    "failed": ("crew_kickoff_failed",),
}
_FLOW_TYPES = {"completed": ("flow_finished",), "failed": ("method_execution_failed",)}
"""What a Flow's server sends besides."""


def _data(run: Execution, type_: str, value: Any) -> dict[str, Any]:
    if type_ == "crew_kickoff_started":
        return {"inputs": dict(run.inputs)}
    if type_ == "crew_kickoff_completed":
        total = run.usage.total_tokens if run.usage else None
        return {"output": run.output or "", **({} if total is None else {"total_tokens": total})}
    if type_ == "flow_finished":
        return {"result": run.output or ""}
    if type_ in ("crew_kickoff_failed", "method_execution_failed"):
        return {"error": run.error or ""}
    if isinstance(value, TaskResult):
        return {"task_name": value.name, "agent_role": value.agent, "output": value.output or ""}
    if isinstance(value, Step):
        return {"task_name": value.task, "agent_role": value.agent, "type": value.kind, "content": value.content}
    if isinstance(value, Question):
        return {"task_name": value.task_id, "output": value.output}
    return {"task_name": value, "agent_role": run.current_agent}
