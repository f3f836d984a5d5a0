"""OpenTelemetry, if the user has set up its SDK: one span for each ended run.

The call that writes the end of the run writes the span, with the times of the attempt, so a run in flight needs no
span. The parent is the current span, which is the span of Prefect's task run in a wait. A span holds no text of the
crew. The names are from the semantic conventions for GenAI, v1.41, and from CrewAI
(crewai/telemetry/tracing/semantic_conventions.py), which puts `crewai.execution_uuid`, the kickoff id, on each span of
the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.store.decision import Attempt, AttemptState

NAME = "prefect_crew"


def end_run(attempt: Attempt) -> None:
    """Write the span of a run."""
    kicked_off = attempt.started_at or attempt.begun_at
    begin, end = _ns(kicked_off), max(_ns(kicked_off), _ns(attempt.ended_at or kicked_off))
    # The attributes by which a sampler decides.
    attributes = {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": attempt.crew,
        "gen_ai.agent.name": attempt.crew,  # the name of the workflow in the GenAI conventions' own v0.1 and later
        "crewai.execution_uuid": str(attempt.first_id),
        "crewai.crew.name": attempt.crew,
    }
    name = f"invoke_workflow {attempt.crew}"
    span = trace.get_tracer(NAME).start_span(name, attributes=attributes, start_time=begin)
    if span.is_recording():
        span.set_attributes({name: value for name, value in _attributes(attempt) if value is not None})
        if attempt.state is not AttemptState.COMPLETED:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)


def _attributes(attempt: Attempt) -> Iterator[tuple[str, Any]]:
    """Yield attributes from the attempt and from Prefect's contexts."""
    yield "error.type", None if attempt.state is AttemptState.COMPLETED else str(attempt.state)
    yield "prefect_crew.state", str(attempt.state)
    yield "prefect_crew.idempotency_key", attempt.key
    yield "prefect_crew.attempt", attempt.number
    yield "prefect_crew.step", attempt.step
    yield "prefect_crew.cost", attempt.cost
    yield "crewai.human_feedback.wait_duration_ms", attempt.human_seconds * 1000 or None
    if (usage := attempt.usage) is not None:
        yield "gen_ai.usage.input_tokens", usage.get("prompt_tokens")
        yield "gen_ai.usage.output_tokens", usage.get("completion_tokens")
        yield "gen_ai.usage.cache_read.input_tokens", usage.get("cached_prompt_tokens")
        yield "prefect_crew.total_tokens", usage.get("total_tokens")
    # Without the names of flow run and task run: they may contain an input.
    if (flow := FlowRunContext.get()) is not None and flow.flow_run is not None:
        yield "prefect.flow_run.id", str(flow.flow_run.id)
    if (task := TaskRunContext.get()) is not None:
        yield "prefect.task_run.id", str(task.task_run.id)
    # The flow run that started the run may be another one than the current one.
    yield "prefect_crew.kickoff.flow_run_id", attempt.flow_run_id


def _ns(seconds: float) -> int:
    """Return a time in OpenTelemetry's form: nanoseconds since the epoch, exact to the microsecond."""
    return round(seconds * 1e6) * 1000
