"""From a webhook's body to an event on the Prefect server. An event contains nothing that may be a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect_crew._text import one_line
from prefect_crew.artifacts.events import resources_of
from prefect_crew.client._parsing import (
    AGENT,
    RUN_KEYS,
    SECONDS,
    USAGE,
    as_id,
    as_list,
    as_number,
    as_object,
    as_text,
    decode,
    pick,
    state_of,
    text_of,
    tokens_of,
)
from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.store.decision import Attempt
from prefect_crew.webhooks import Hook

MAX_STREAMED = 200
"""Events of one stream delivery that are passed on."""
_MAX_ID = 300
_MAX_NAME = 100
_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_MODEL = re.compile(r"[\w./:@-]{1,80}", re.ASCII)
_TIME = re.compile(r"[\d.:+TZ -]{1,40}", re.ASCII)
_TYPE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class WebhookEvent:
    """An event that the receiver has read from a webhook's body.

    Its name on the Prefect server is `crew.webhook.` and then `name`. `facts` are the body's, which nobody has checked.
    `task` and `output` are of a question: the task, and the text that a person has to judge.
    """

    hook: Hook
    name: str
    facts: Mapping[str, Any]
    kickoff_id: str | None = None
    usage: TokenUsage | None = None
    task: str | None = field(default=None, repr=False)
    output: str | None = field(default=None, repr=False)


def read_events(hook: Hook, body: bytes) -> list[WebhookEvent]:
    """Return the events in a delivery: one event, or up to `MAX_STREAMED` events of a stream.

    Raises:
        ResponseFormatError: The body is not an object, or names no run, or is of a stream and holds no events.
    """
    expected, text = f"a {hook.kind} webhook's body", body.decode("utf-8", "replace")
    value = decode(text)
    source = as_object(value)
    if hook.kind == "stream":
        stream = source.get("events", value)
        items = as_list(stream) if isinstance(stream, list) else [stream]
        events = [as_object(item) for item in items if isinstance(item, dict)]
        is_one = any(pick(as_id, item, *RUN_KEYS) or as_text(item.get("type")) for item in events)
        if len(events) < len(items) or (events and not is_one):
            raise ResponseFormatError(expected=expected, body=text)
        return [_streamed(hook, event) for event in events[:MAX_STREAMED]]
    kickoff_id = pick(as_id, source, *RUN_KEYS)
    if kickoff_id is None or not kickoff_id.isprintable():  # no run of ours has such an id
        raise ResponseFormatError(expected=f"{expected} that names its run", body=text)
    state, usage, is_question = state_of(source), pick(tokens_of, source, *USAGE), hook.kind == "human_input"
    facts_of_body = {
        "kickoff_id": kickoff_id,
        "task_id": as_id(source.get("task_id")),
        "state": str(state.state) if state and state.state else None,
        "execution_time": pick(as_number, source, SECONDS),
        **_counts(usage),
    }
    names = {
        "name": pick(as_text, source, "name", "task_name"),
        "agent": pick(as_text, source, *AGENT),
        "tool": as_text(source.get("tool")),
        "step_type": as_text(source.get("step_type")),
    }
    event = WebhookEvent(
        hook=hook,
        name=hook.kind,
        facts=_event_facts(hook, facts_of_body, names),
        kickoff_id=_short(kickoff_id),
        usage=usage,
        task=_short(as_id(source.get("task_id"))) if is_question else None,
        output=_output_of(source) if is_question and hook.texts else None,
    )
    return [event]


def _output_of(source: Mapping[str, Any]) -> str | None:
    """Return the text that a person is to judge; an object is shown as its own text."""
    for value in map(source.get, ("task_output", "output", "prompt")):
        inner = as_object(value)
        if text := as_text(inner.get("raw")) or as_text(inner.get("output")) or text_of(value):
            return text
    return None


def _streamed(hook: Hook, event: Mapping[str, Any]) -> WebhookEvent:
    lowered = (as_text(event.get("type")) or "").lower()
    type_ = lowered if _TYPE.fullmatch(lowered) else "other"
    id_, kickoff_id, time = as_id(event.get("id")), pick(as_id, event, *RUN_KEYS), text_of(event.get("timestamp"))
    data = as_object(event.get("data"))
    model, usage = as_text(data.get("model")) or "", tokens_of(data.get("usage")) or tokens_of(data)
    facts = {
        "id": id_,
        "kickoff_id": kickoff_id,
        "at": time if hook.names or _TIME.fullmatch(time or "") else None,
        **_counts(usage),
        "model": model if _MODEL.fullmatch(model) else None,
    }
    return WebhookEvent(
        hook=hook,
        name=f"stream.{type_}",
        facts=_event_facts(hook, facts, {"name": data.get("task_name"), "agent": data.get("agent_role")}),
        kickoff_id=_short(kickoff_id),
        usage=usage,
    )


def _counts(usage: TokenUsage | None) -> dict[str, Any]:
    return {} if usage is None else usage.model_dump(exclude_none=True)


def _event_facts(hook: Hook, facts: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of an event, without names, and without ids that may be sentences, if these may hold a secret.

    The facts have no control characters: PostgreSQL stores no NUL, and the server would lose other events too.
    """
    result: dict[str, Any] = {}
    for key, value in ({**facts, **names} if hook.names else facts).items():
        if not isinstance(value, str):
            result |= {key: value} if isinstance(value, int | float) else {}
        elif not key.endswith("id"):
            result |= {key: text} if (text := one_line(value)[:_MAX_NAME]) else {}
        elif _short(value) and (hook.names or _ID.fullmatch(value)):
            result[key] = value  # ids are whole or absent: half an id is another id
    return result


def _short(value: str | None) -> str | None:
    return value if value is not None and len(value) <= _MAX_ID and value.isprintable() else None


def event_name(event: WebhookEvent) -> str:
    """Return the name of the Prefect event, which is also the kind of the news."""
    return f"crew.webhook.{event.name}"


def is_task_name(hook: Hook, attempt: Attempt, task: str) -> bool:
    """Return whether the crew database may have the name of a task, which may repeat an input."""
    return bool(_ID.fullmatch(task)) or (hook.names and not attempt.secret_names)


def prefect_event(event: WebhookEvent, attempt: Attempt) -> dict[str, Any]:
    """Return the arguments of Prefect's `emit_event`. The signed URL, never the body, names the run of the event.

    A question or an end of a run has one id, whatever the bodies contain, so that the server keeps one event of each.
    """
    name, key = event_name(event), attempt.key
    run = attempt.first_id or f"{key}/{attempt.number}"
    resource, related = resources_of(key, run, attempt.first_id or key, attempt.crew, attempt.step, attempt.flow_run_id)
    facts = {"idempotency_key": key, "attempt": attempt.number, "round": event.hook.round, "said": dict(event.facts)}
    return {
        "id": uuid5(NAMESPACE_URL, f"prefect-crew/{attempt.id}/{name}/{event.hook.round}"),
        "event": name,
        "resource": resource,
        "related": related,
        "payload": facts,
    }
