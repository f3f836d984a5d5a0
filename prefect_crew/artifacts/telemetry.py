"""OpenTelemetry, if the user has set up its SDK: one span for each ended run, and metrics.

The call that closes the run writes the span, with the times of the record, so a run in flight needs no span. The parent
is the current span, which is the span of Prefect's task run in a wait. The names are from the semantic conventions for
GenAI, v1.41, and from CrewAI (crewai/telemetry/tracing/semantic_conventions.py), which puts `crewai.execution_uuid`,
the kickoff id, on each span of the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import httpx
from opentelemetry import metrics, trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer
from prefect.context import FlowRunContext, TaskRunContext

from prefect_crew.artifacts.run import TASKS_CAP, RunView
from prefect_crew.client.models import TaskResult
from prefect_crew.records.model import RunRecord
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

NAME = "prefect_crew"
NAME_CAP, CONTENT_CAP = 200, 64_000
"""The most characters of a name and of a text on a span. A collector refuses a too large request with all its spans."""

# Without an SDK these do nothing; the SDK replaces them when the user sets it up.
_meter = metrics.get_meter(NAME)
_runs = _meter.create_counter("prefect_crew.runs", "{run}", "Runs that ended, by state")
_seconds = _meter.create_histogram(
    "prefect_crew.run.duration",
    "s",
    "Time from a run's kickoff until its end was seen",
    explicit_bucket_boundaries_advisory=[1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400],
)
_tokens = _meter.create_counter("prefect_crew.tokens", "{token}", "Tokens that ended runs reported")
_cost = _meter.create_counter("prefect_crew.cost", description="Cost of ended runs, by the crew's price")
_uncertain = _meter.create_counter("prefect_crew.kickoffs.uncertain", "{kickoff}", "Kickoffs that became uncertain")
_waiting = _meter.create_up_down_counter("prefect_crew.runs.waiting", "{run}", "Runs that wait for a person")


def count_uncertain(record: RunRecord) -> None:
    """Count a kickoff that this process has sent and that became uncertain."""
    _uncertain.add(1, {"crewai.crew.name": record.crew})


def count_waiting(crew: str | None, change: int) -> None:
    """Count a run that began (1) or ended (-1) to wait for a person, while this process waits for the run."""
    _waiting.add(change, {"crewai.crew.name": crew or "unknown"})


def end_run(
    record: RunRecord, view: Callable[[], RunView] | None = None, *, settings: CrewSettings | None = None
) -> None:
    """Write the span of a run and count it.

    `view` returns the facts beyond the record, masked. Without `settings`, the function reads them, which takes 3 ms.
    """
    kicked_off = record.kicked_off_at or record.claimed_at
    begin, end = _ns(kicked_off), max(_ns(kicked_off), _ns(record.ended_at or kicked_off))
    labels = {"crewai.crew.name": record.crew}
    ended = {**labels, "prefect_crew.state": str(record.state)}
    _runs.add(1, ended)
    _seconds.record((end - begin) / 1e9, ended)
    if (usage := record.usage) is not None:
        for kind, count in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
            if count is not None:
                _tokens.add(count, {**labels, "gen_ai.token.type": kind})
    if record.cost is not None:
        _cost.add(record.cost, labels)
    tracer = trace.get_tracer(NAME)
    # The attributes by which a sampler decides.
    attributes = {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": record.crew,
        "gen_ai.agent.name": record.crew,  # the name of the workflow in the GenAI conventions' own v0.1 and later
        "crewai.execution_uuid": str(record.kickoff_id),
        **labels,
    }
    span = tracer.start_span(f"invoke_workflow {record.crew}", attributes=attributes, start_time=begin)
    if not span.is_recording():
        return
    nothing = RunView(record.crew, str(record.kickoff_id), None, CrewState.UNKNOWN, show="none")
    run_view = nothing if view is None else view()
    with_content = run_view.show == "full" and (settings or CrewSettings()).trace_content
    _set(span, _attributes(record, run_view, with_content=with_content))
    if record.state is not CrewState.COMPLETED:
        span.set_status(Status(StatusCode.ERROR, None if run_view.show == "none" else record.error))
    if run_view.show != "none":
        _write_tasks(tracer, span, run_view, begin, end, with_content=with_content)
    span.end(end)


def _attributes(record: RunRecord, view: RunView, *, with_content: bool) -> Iterator[tuple[str, Any]]:
    """Yield attributes from the record, from Prefect's contexts, and from the crew's last status if `view` has it."""
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
    if (status := view.status) is None:
        return
    yield "crewai.crew.execution_duration_ms", status.execution_time and status.execution_time * 1000
    models = sorted(status.usage_by_model)[:TASKS_CAP]
    yield "gen_ai.response.model", models[0] if len(models) == 1 else None
    yield "prefect_crew.models", models or None
    if with_content and view.inputs is not None:
        yield "gen_ai.input.messages", _message("user", json.dumps(view.inputs, ensure_ascii=False))
    if with_content and status.output is not None:
        yield "gen_ai.output.messages", _message("assistant", status.output, finish_reason="stop")


def _message(role: str, text: str, **more: str) -> str:
    """Return a text in the form of the conventions: a JSON list of messages, each with parts."""
    parts = [{"type": "text", "content": text[:CONTENT_CAP]}]
    return json.dumps([{"role": role, "parts": parts, **more}], ensure_ascii=False)


def _write_tasks(tracer: Tracer, run: Span, view: RunView, begin: int, end: int, *, with_content: bool) -> None:
    """Write a span for each known task, in their order.

    The crew API does not report when a task starts. If a status named the task, its span starts at that status, and
    ends when a status first named the next task, or at the end of the run. Other tasks are a point at the end of the
    run, with the attribute that their times are unknown.
    """
    tasks, first_seen = ([] if view.status is None else [*view.status.tasks]), view.tasks_seen
    if view.state is not CrewState.COMPLETED:
        names = {task.name for task in tasks}
        tasks += [TaskResult(name=name) for name in first_seen if name not in names]
    starts = sorted(first_seen.values())
    context = trace.set_span_in_context(run)
    for number, task in enumerate(tasks[:TASKS_CAP], start=1):
        at = first_seen.get(task.name or "")
        name, agent = (None if text is None else text[:NAME_CAP] for text in (task.name, task.agent))
        following = next((_ns(moment) for moment in starts if at is not None and moment > at), end)
        start = end if at is None else min(max(_ns(at), begin), end)
        span = tracer.start_span(f"execute_task {name or number}", context, start_time=start)
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "execute_task",
            "gen_ai.agent.name": agent,
            "crewai.agent.role": agent,
            "crewai.task.name": name,
            "crewai.task.output": task.output[:CONTENT_CAP] if task.output and with_content else None,
            "crewai.execution_uuid": view.kickoff_id,
            "prefect_crew.task.number": number,
            "prefect_crew.task.execution_time": task.execution_time,
            "prefect_crew.task.times": "unknown" if at is None else "seen",
        }
        _set(span, attributes.items())
        span.end(min(max(following, start), end))


def _set(span: Span, attributes: Iterable[tuple[str, Any]]) -> None:
    span.set_attributes({name: value for name, value in attributes if value is not None})


def _ns(moment: datetime) -> int:
    """Return a time in OpenTelemetry's form: nanoseconds since the epoch, exact to the microsecond."""
    return round(moment.timestamp() * 1e6) * 1000
