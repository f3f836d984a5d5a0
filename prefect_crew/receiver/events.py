"""From a webhook's body to an event on the Prefect server. An event contains nothing that may be a secret."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect_crew._text import one_line
from prefect_crew.artifacts.events import resources_of
from prefect_crew.client._parsing import (
    AGENT,
    RUN_KEYS,
    SECONDS,
    USAGE,
    as_id,
    as_list,
    as_name,
    as_number,
    as_object,
    as_text,
    decode,
    pick,
    shown,
    state_of,
    text_of,
    tokens_of,
)
from prefect_crew.client.models import TokenUsage
from prefect_crew.exceptions import ResponseFormatError
from prefect_crew.records.model import utcnow
from prefect_crew.webhooks import Hook

MAX_STREAMED = 200  # events of one stream delivery that are passed on
_MAX_ID = 300
_MAX_NAME = 100
_MAX_KEY = 1000  # characters; a longer idempotency key is not a run's
_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_MODEL = re.compile(r"[\w./:@-]{1,80}", re.ASCII)
_TIME = re.compile(r"[\d.:+TZ -]{1,40}", re.ASCII)
_TYPE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class WebhookEvent:
    """An event that the receiver has read from a webhook's body.

    Its name on the Prefect server is `crew.webhook.` and then `name`. `facts` are the body's, which nobody has checked.
    The same delivery has the same `id`, so that a process that waits counts one webhook of two. `said_key` is the
    idempotency key in the body's `meta`, if there is one. `output` is the text that a person has to judge.
    """

    hook: Hook
    name: str
    id: UUID
    facts: Mapping[str, Any]
    kickoff_id: str | None = None
    said_key: str | None = None
    output: str | None = field(default=None, repr=False)
    received: datetime = field(default_factory=utcnow)


def read_events(hook: Hook, body: bytes) -> list[WebhookEvent]:
    """Return the events in a delivery: one event, or up to `MAX_STREAMED` events of a stream.

    The same body at the same URL gives the same ids, so that a process that waits counts each event once.

    Raises:
        ResponseFormatError: The body is not an object, or names no run, or is of a stream and holds no events.
    """
    expected = f"a {hook.kind} webhook's body"
    value = decode(body, expected=expected)
    source = as_object(value)
    facts = repr((hook.kind, hook.idempotency_key, hook.attempt, hook.round)).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(facts + b"\0" + body).hexdigest()
    if hook.kind == "stream":
        stream = source.get("events", value)
        items = as_list(stream) if isinstance(stream, list) else [stream]
        events = [as_object(item) for item in items if isinstance(item, dict)]
        is_one = any(pick(as_id, item, *RUN_KEYS) or as_text(item.get("type")) for item in events)
        if len(events) < len(items) or (events and not is_one):
            raise ResponseFormatError(expected=expected, body=shown(body))
        streamed = enumerate(events[:MAX_STREAMED])
        return [_streamed(hook, event, f"{digest}/{number}") for number, event in streamed]
    kickoff_id = pick(as_id, source, *RUN_KEYS)
    if kickoff_id is None or not kickoff_id.isprintable():  # no run of ours has such an id
        raise ResponseFormatError(expected=f"{expected} that names its run", body=shown(body))
    state = state_of(source)
    facts_of_body = {
        "kickoff_id": kickoff_id,
        "task_id": as_id(source.get("task_id")),
        "state": str(state.state) if state and state.is_known else None,
        "execution_time": pick(as_number, source, SECONDS),
        **_counts(pick(tokens_of, source, *USAGE)),
    }
    names = {
        "name": pick(as_name, source, "name", "task_name"),
        "agent": pick(as_name, source, *AGENT),
        "tool": as_text(source.get("tool")),
        "step_type": as_text(source.get("step_type")),
    }
    event = WebhookEvent(
        hook=hook,
        name=hook.kind,
        id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/{digest}"),
        facts=_event_facts(hook, facts_of_body, names),
        kickoff_id=_short(kickoff_id),
        said_key=_idempotency_key(source.get("meta")),
        output=_output_of(source) if hook.kind == "human_input" and hook.names else None,
    )
    return [event]


def _output_of(source: Mapping[str, Any]) -> str | None:
    """Return the text that a person is to judge; an object is shown as its own text."""
    for value in map(source.get, ("task_output", "output", "prompt")):
        inner = as_object(value)
        if text := as_text(inner.get("raw")) or as_text(inner.get("output")) or text_of(value):
            return text
    return None


def _streamed(hook: Hook, event: Mapping[str, Any], place: str) -> WebhookEvent:
    lowered = (as_text(event.get("type")) or "").lower()
    type_ = lowered if _TYPE.fullmatch(lowered) else "other"
    id_, kickoff_id, time = as_id(event.get("id")), pick(as_id, event, *RUN_KEYS), text_of(event.get("timestamp"))
    data = as_object(event.get("data"))
    model = as_text(data.get("model")) or ""
    facts = {
        "id": id_,
        "kickoff_id": kickoff_id,
        "at": time if hook.names or _TIME.fullmatch(time or "") else None,
        **_counts(tokens_of(data.get("usage")) or tokens_of(data)),
        "model": model if _MODEL.fullmatch(model) else None,
    }
    # An event that comes once more in another batch is still the same.
    same = f"{hook.idempotency_key}/{hook.attempt}/{kickoff_id}/{id_}" if id_ else place
    return WebhookEvent(
        hook=hook,
        name=f"stream.{type_}",
        id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/stream/{type_}/{same}"),
        facts=_event_facts(hook, facts, {"name": data.get("task_name"), "agent": data.get("agent_role")}),
        kickoff_id=_short(kickoff_id),
        said_key=_idempotency_key(data.get("meta")),
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


def _idempotency_key(meta: Any) -> str | None:
    key = as_object(meta).get("idempotency_key")
    return key[:_MAX_KEY] if isinstance(key, str) else None


def event_name(event: WebhookEvent) -> str:
    """Return the name of the Prefect event."""
    return f"crew.webhook.{event.name}"


def prefect_event(event: WebhookEvent) -> dict[str, Any]:
    """Return the arguments of Prefect's `emit_event`. The signed URL, never the body, names the run of the event.

    A question or an end of a run has one id, whatever the bodies contain, so that the server keeps one event of each.
    """
    hook, name = event.hook, event_name(event)
    key = hook.idempotency_key
    run = key if hook.attempt is None else f"{key}/{hook.attempt}"
    resource, related = resources_of(key, run, key, hook.crew or "unknown", hook.step, hook.flow_run_id)
    return {
        "id": uuid5(NAMESPACE_URL, f"prefect-crew/{run}/{hook.claim}/{name}/{hook.round}"),
        "occurred": event.received,
        "event": name,
        "resource": resource,
        "related": related,
        "payload": {
            "idempotency_key": key,
            "attempt": hook.attempt,
            "claim": hook.claim,
            "round": hook.round,
            "said": dict(event.facts),
        },
    }
