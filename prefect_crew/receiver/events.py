"""What the receiver reads in the bodies of webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect_crew.client._parsing import (
    RUN_KEYS,
    USAGE,
    as_id,
    as_list,
    as_object,
    as_text,
    decode,
    pick,
    text_of,
    tokens_of,
)
from prefect_crew.client._transport import unreadable
from prefect_crew.client.models import TokenUsage
from prefect_crew.client.webhooks import RUN_ENDS

MAX_STREAMED = 200
"""Events of one stream delivery that are read."""


@dataclass(frozen=True)
class WebhookEvent:
    """One event in a webhook's body. `kind` is the kind of its news; `id` is that of a streamed event.

    `task` and `output` are of a question: the task, and the text that a person has to judge.
    """

    kind: str
    kickoff_id: str | None
    usage: TokenUsage | None = None
    id: str | None = None
    task: str | None = field(default=None, repr=False)
    output: str | None = field(default=None, repr=False)


def read_events(kind: str, body: bytes) -> list[WebhookEvent]:
    """Return the events in a delivery: one event, or the ends in up to `MAX_STREAMED` events of a stream.

    Raises:
        ResponseFormatError: The body is no JSON, or names no run.
    """
    text = body.decode("utf-8", "replace")
    value = decode(text)
    source = as_object(value)
    if kind == "stream":
        streamed = source.get("events", value)
        events = [as_object(event) for event in (as_list(streamed) or [streamed])[:MAX_STREAMED]]
        return [_end(event) for event in events if str(event.get("type")).lower() in RUN_ENDS]
    kickoff_id = _run_id(source)
    if kickoff_id is None:
        raise unreadable(f"a {kind} webhook's body that names its run", text)
    if kind == "human_input":
        task = as_id(source.get("task_id"))
        return [WebhookEvent("webhook.human_input", kickoff_id, task=task, output=_output_of(source))]
    return [WebhookEvent(f"webhook.{kind}", kickoff_id, pick(tokens_of, source, *USAGE))]


def _end(event: Mapping[str, Any]) -> WebhookEvent:
    data = as_object(event.get("data"))
    usage = tokens_of(data.get("usage")) or tokens_of(data)
    return WebhookEvent(f"webhook.stream.{event['type'].lower()}", _run_id(event), usage, as_id(event.get("id")))


def _run_id(source: Mapping[str, Any]) -> str | None:
    """Return the id of a run. No run of ours has an id with control characters."""
    id_ = pick(as_id, source, *RUN_KEYS)
    return id_ if id_ is not None and id_.isprintable() else None


def _output_of(source: Mapping[str, Any]) -> str | None:
    """Return the text that a person is to judge; an object is shown as its own text."""
    for value in map(source.get, ("task_output", "output", "prompt")):
        inner = as_object(value)
        if text := as_text(inner.get("raw")) or as_text(inner.get("output")) or text_of(value):
            return text
    return None
