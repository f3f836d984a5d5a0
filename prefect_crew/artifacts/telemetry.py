"""OpenTelemetry, if the user has set up its SDK: one span for each ended run, and two counters.

The call that closes the run writes the span, with the times of the record, so a run in flight needs no span. The parent
is the current span, which is the span of Prefect's task run in a wait. A span holds no text of the crew. The names are
from the semantic conventions for GenAI, v1.41, and from CrewAI (crewai/telemetry/tracing/semantic_conventions.py),
which puts `crewai.execution_uuid`, the kickoff id, on each span of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
from opentelemetry import metrics, trace
from opentelemetry.trace import Status, StatusCode
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.records.model import RunRecord
from prefect_crew.states import CrewState

NAME = "prefect_crew"

# Without an SDK these do nothing; the SDK replaces them when the user sets it up.
_meter = metrics.get_meter(NAME)
_runs = _meter.create_counter("prefect_crew.runs", "{run}", "Runs that ended, by state")
_uncertain = _meter.create_counter("prefect_crew.kickoffs.uncertain", "{kickoff}", "Kickoffs that became uncertain")


def count_uncertain(record: RunRecord) -> None:
    """Count a kickoff that this process has sent and that became uncertain."""
    _uncertain.add(1, {"crewai.crew.name": record.crew})


def end_run(record: RunRecord) -> None:
    """Write the span of a run and count it."""
    _runs.add(1, {"crewai.crew.name": record.crew, "prefect_crew.state": str(record.state)})
    kicked_off = record.kicked_off_at or record.claimed_at
    begin, end = _ns(kicked_off), max(_ns(kicked_off), _ns(record.ended_at or kicked_off))
    # The attributes by which a sampler decides.
    attributes = {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": record.crew,
        "gen_ai.agent.name": record.crew,  # the name of the workflow in the GenAI conventions' own v0.1 and later
        "crewai.execution_uuid": str(record.kickoff_id),
        "crewai.crew.name": record.crew,
    }
    name = f"invoke_workflow {record.crew}"
    span = trace.get_tracer(NAME).start_span(name, attributes=attributes, start_time=begin)
    if span.is_recording():
        span.set_attributes({name: value for name, value in _attributes(record) if value is not None})
        if record.state is not CrewState.COMPLETED:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)


def _attributes(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield attributes from the record and from Prefect's contexts."""
    yield "server.address", httpx.URL(record.crew_url).host
    yield "error.type", None if record.state is CrewState.COMPLETED else str(record.state)
    yield "prefect_crew.state", str(record.state)
    yield "prefect_crew.idempotency_key", record.idempotency_key
    yield "prefect_crew.attempt", record.attempt
    yield "prefect_crew.step", record.step
    yield "prefect_crew.cost", record.cost
    yield "gen_ai.agent.version", record.crew_version
    yield "crewai.human_feedback.wait_duration_ms", record.human_seconds * 1000 or None
    if (usage := record.usage) is not None:
        yield "gen_ai.usage.input_tokens", usage.prompt_tokens
        yield "gen_ai.usage.output_tokens", usage.completion_tokens
        yield "gen_ai.usage.cache_read.input_tokens", usage.cached_prompt_tokens
        yield "prefect_crew.total_tokens", usage.total_tokens
    # Without the names of flow run and task run: they may contain an input.
    if (flow := FlowRunContext.get()) is not None and flow.flow_run is not None:
        yield "prefect.flow_run.id", str(flow.flow_run.id)
    if (task := TaskRunContext.get()) is not None:
        yield "prefect.task_run.id", str(task.task_run.id)
    # The flow run that started the run may be another one than the current one.
    yield "prefect_crew.kickoff.flow_run_id", record.flow_run_id


def _ns(moment: datetime) -> int:
    """Return a time in OpenTelemetry's form: nanoseconds since the epoch, exact to the microsecond."""
    return round(moment.timestamp() * 1e6) * 1000
