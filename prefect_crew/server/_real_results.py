"""What CrewAI's results mean in the crew API's words.

This module imports CrewAI: import it only after `prepare_crewai`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from crewai import Crew, Flow, Task
from crewai.crews.crew_output import CrewOutput
from crewai.flow import HumanFeedbackResult
from crewai.lite_agent_output import LiteAgentOutput
from crewai.tasks.task_output import TaskOutput
from crewai.types.usage_metrics import UsageMetrics
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from prefect_crew.api.models import CrewInput, TaskResult, TokenUsage

__all__ = ["inputs_of", "is_flow", "name_of", "result_of", "share_a_model", "task_label", "task_result", "token_usage"]

_PLACEHOLDER = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")
"""What CrewAI fills in. `fetch_inputs` also reports other text in braces, such as JSON in a prompt."""


def name_of(made: Crew | Flow[Any]) -> str | None:
    """Return the name that a crew or flow was given; of a nameless flow, its class's; of a nameless crew, None."""
    if isinstance(made, Crew):
        return made.name if made.name != "crew" else None  # CrewAI's default
    return made.name or type(made).__name__


def inputs_of(made: Crew | Flow[Any]) -> list[CrewInput]:
    """Return the inputs of a crew or flow that has not run.

    A crew's are the placeholders of its tasks and agents, all required. A flow's are the fields of its state model that
    are required or have a description, or all of them where none has one; there are none where the state is a
    dictionary. CrewAI cannot make a state whose fields lack a default, so a field is required where it says so:
    `topic: str = Field(default="", json_schema_extra={"required": True})`.
    """
    if isinstance(made, Crew):
        return [CrewInput(name=name) for name in sorted(made.fetch_inputs()) if _PLACEHOLDER.fullmatch(name)]
    state: Any = made.state
    if not isinstance(state, BaseModel):
        return []
    inputs: list[CrewInput] = []
    fields = {
        name: field for name, field in type(state).model_fields.items() if name != "id"
    }  # which is the state's own
    described = any(field.description for field in fields.values())
    for name, field in fields.items():
        extra: Any = field.json_schema_extra
        required = field.is_required() or (isinstance(extra, dict) and extra.get("required") is True)  # pyright: ignore[reportUnknownMemberType]
        if described and not (required or field.description):  # a field that the flow keeps for itself
            continue
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        default = None if required else _jsonable(field.get_default(call_default_factory=True))
        inputs.append(
            CrewInput(name=name, type=kind, description=field.description, required=required, default=default)
        )
    return inputs


def is_flow(made: Crew | Flow[Any]) -> bool:
    """Return whether it is a flow, and no crew."""
    return isinstance(made, Flow)


def share_a_model(first: Crew | Flow[Any], second: Crew | Flow[Any]) -> bool:
    """Tell whether two crews of one factory, or two agents of one crew, use the same model object."""
    if not (isinstance(first, Crew) and isinstance(second, Crew)):
        return False  # a flow makes its agents as it runs
    models = [id(agent.llm) for crew in (first, second) for agent in crew.agents if not isinstance(agent.llm, str)]
    return len(set(models)) < len(models)


def task_label(task: Task) -> str:
    """Return what the server calls a task: its name, or the start of its description."""
    if task.name:
        return task.name
    description = " ".join(task.description.split())
    return description if len(description) <= 60 else f"{description[:59].rstrip()}…"


def task_result(task: Task, output: TaskOutput) -> TaskResult:
    """Return what an ended task gave."""
    text, data = result_of(output)
    return TaskResult(
        name=task_label(task),
        agent=output.agent,
        output=text,
        data=data,
        execution_time=task.execution_duration,
        description=output.description,
    )


def result_of(value: Any) -> tuple[str, Any]:
    """Return the text of a result, and its structured form as JSON values, or None where it is text alone."""
    if value is None:
        return "", None
    if isinstance(value, (CrewOutput, TaskOutput, LiteAgentOutput)):
        return value.raw, _jsonable(value.to_dict()) or None
    if isinstance(value, HumanFeedbackResult):
        return result_of(value.output)
    plain = _jsonable(value)
    if isinstance(plain, str):
        return plain, None
    return json.dumps(plain, ensure_ascii=False), None if isinstance(plain, (bool, int, float)) else plain


def token_usage(metrics: UsageMetrics) -> TokenUsage | None:
    """Return the usage, or None where the models have counted nothing."""
    if not (metrics.successful_requests or metrics.total_tokens):
        return None
    return TokenUsage(
        total_tokens=metrics.total_tokens,
        prompt_tokens=metrics.prompt_tokens,
        completion_tokens=metrics.completion_tokens,
        cached_prompt_tokens=metrics.cached_prompt_tokens,
        successful_requests=metrics.successful_requests,
    )


def _jsonable(value: Any) -> Any:
    return to_jsonable_python(value, fallback=str, inf_nan_mode="null")
