"""The webhooks of a run: their bodies, the event streams, and their sender."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from datetime import UTC, datetime
from typing import Any

import httpx

from prefect_crew.client._transport import tls_context
from prefect_crew.client.models import TaskResult
from prefect_crew.client.webhooks import BasicAuth, BearerAuth
from prefect_crew.devserver._faults import Faults
from prefect_crew.devserver._response_formats import Documented, task_report, usage_counts
from prefect_crew.devserver._runs import Question, Run, Spawn, Step

_MAX_CONCURRENT = 32
_TIMEOUT = 10.0

logger = logging.getLogger(__name__)


def _body(run: Run, value: Any, response_format: Documented) -> dict[str, Any]:
    """Return the body of a webhook about `value`, or about the completed run: no failure body is documented."""
    facts = {"kickoff_id": run.id, "meta": run.meta}
    match value:
        case TaskResult():
            return task_report(run, value)
        case Step():
            return {
                "prompt": f"{value.task or 'task'} ({value.agent or 'agent'})",
                "thought": "" if value.tool else value.content,
                "tool": value.tool or "",
                "tool_input": "",
                "result": value.content if value.tool else "",
                **facts,
            }
        case Question():
            task_id = response_format.question_id(value)
            return {"execution_id": run.id, "task_id": task_id, "task_output": value.output, **facts}
        case _:
            return {
                "result": run.output or "",
                "result_json": run.data,
                "token_usage": usage_counts(run.usage),
                **facts,
            }


_EVENT_TYPES = {
    "started": ("crew_kickoff_started",),
    "task_started": ("task_started", "agent_execution_started"),
    "step": ("agent_logs_execution",),
    "task_ended": ("agent_execution_completed", "task_completed"),
    "waiting": ("human_feedback_requested",),
    "completed": ("crew_kickoff_completed", "flow_finished"),
    "failed": ("crew_kickoff_failed", "method_execution_failed"),
}
"""The types of CrewAI's events by what the sender, a `runs.Listener`, hears."""
_OF_FLOWS = ("flow_finished", "method_execution_failed")


def _stream_body(run: Run, type_: str, value: Any) -> dict[str, Any]:
    match value:
        case TaskResult():
            data = {"task_name": value.name, "agent_role": value.agent, "output": value.output or ""}
        case Step():
            data = {"task_name": value.task, "agent_role": value.agent, "type": value.kind, "content": value.content}
        case Question():
            data = {"task_name": value.task_id, "output": value.output}
        case None if run.state.ended:
            facts = {"output": run.output, "result": run.output, "error": run.error}
            facts |= {"total_tokens": run.usage.total_tokens if run.usage else None}
            data = {name: fact for name, fact in facts.items() if fact is not None}
        case None:
            data = {"inputs": dict(run.inputs)}
        case name:
            data = {"task_name": name, "agent_role": run.current_agent}
    event = {
        "id": str(uuid.uuid4()),
        "execution_id": run.id,
        "timestamp": datetime.now(UTC).isoformat(),
        "type": type_,
        "data": {"meta": run.meta, **data},
    }
    return {"events": [event]}


class WebhookSender:
    """A `Listener` that sends a run's events to its webhooks."""

    def __init__(self, faults: Faults, spawn: Spawn, response_format: Documented) -> None:
        self._faults = faults
        self._spawn = spawn
        self._format = response_format
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)

    def __call__(self, run: Run, event: str, value: Any) -> None:
        """Send an event of the run to its targets."""
        targets = run.targets
        match value:
            case TaskResult():
                kind, target = "task", targets.task
            case Step():
                kind, target = "step", targets.step
            case Question():
                kind, target = "human", targets.human_input
            case _:
                kind, target = "crew", targets.crew if event == "completed" else None
        if target is not None:
            url, authentication = (target, None) if isinstance(target, str) else (target.url, target.authentication)
            self._send(kind, url, _body(run, value, self._format), authentication)
        if (stream := targets.stream) is not None:
            for type_ in _EVENT_TYPES.get(event, ()):
                if type_ in stream.events and (run.is_flow or type_ not in _OF_FLOWS):
                    self._send("stream", stream.url, _stream_body(run, type_, value), stream.authentication)

    def _send(self, kind: str, url: str, body: dict[str, Any], authentication: BearerAuth | BasicAuth | None) -> None:
        drawn = {fault.name: fault.value or 0.0 for fault in self._faults.draw("webhook", f"webhook-{kind}")}
        if "lose" in drawn:
            return
        headers, auth = {"Content-Type": "application/json"}, httpx.Auth()
        if isinstance(authentication, BearerAuth):
            headers["Authorization"] = f"Bearer {authentication.token.get_secret_value()}"
        elif authentication is not None:
            auth = httpx.BasicAuth(authentication.username, authentication.password.get_secret_value())
        request = {"content": json.dumps(body, default=str).encode(), "headers": headers, "auth": auth}
        for _ in range(2 if "double" in drawn else 1):
            self._spawn(self._deliver(kind, url, drawn.get("delay", 0.0), request))

    async def _deliver(self, kind: str, url: str, delay: float, request: dict[str, Any]) -> None:
        await asyncio.sleep(delay)
        async with self._slots, httpx.AsyncClient(verify=tls_context(), timeout=_TIMEOUT, trust_env=False) as client:
            try:
                await client.post(url, **request)
            except Exception as error:  # noqa: BLE001 - httpx raises others too, where a URL or a header cannot be sent
                # Without the text of the error: the URL and the headers may hold all that protects the receiver.
                logger.warning("The %s webhook was not delivered: %s", kind, type(error).__name__)
