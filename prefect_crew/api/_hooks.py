"""From what a crew's server posts to a webhook to one model, in both generations of bodies. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from prefect_crew.api import _shapes as shapes
from prefect_crew.api._decode import RUN_KEYS, as_id, as_object, as_text, decode, first, id_of, is_object, shown
from prefect_crew.api.errors import ResponseFormatError
from prefect_crew.api.models import CrewState, StreamEvent, WebhookBody

__all__ = ["WebhookKind", "parse_webhook"]

WebhookKind = Literal["task", "step", "crew", "human_input", "stream"]

_OUTPUTS = {
    "task": ("output", "raw", "result", "summary"),
    "step": ("content", "result", "output", "thought"),
    "human_input": ("task_output", "output", "prompt"),
}


def parse_webhook(kind: WebhookKind, body: Any) -> WebhookBody:
    """Return what a delivery to a hook of `kind` says.

    Raises:
        ResponseFormatError: The body is no object, or names no run; for a stream: there is no list of events in it.
    """
    expected = f"a {kind} webhook's body"
    value = decode(body, expected=expected)
    if kind == "stream":
        return _stream(value, expected)
    source = as_object(value)
    kickoff_id = id_of(source, RUN_KEYS)
    if kickoff_id is None or not kickoff_id.isprintable():  # no run of ours has such an id
        raise ResponseFormatError(expected=f"{expected} that names its run", body=shown(value))
    found = shapes.state_of(source)
    facts: dict[str, Any] = {
        "kind": kind,
        "kickoff_id": kickoff_id,
        "task_id": as_id(source.get("task_id")),
        "name": shapes.named(source, ("name", "task_name")),
        "description": as_text(source.get("description")),
        "agent": shapes.agent_of(source),
        "state": found.state if found and found.known else None,
        "raw_state": found.word if found else None,
        "step_type": as_text(source.get("step_type")),
        "tool": as_text(source.get("tool")),
        "execution_time": shapes.seconds_of(source),
        "usage": shapes.usage_of(source),
        "meta": source.get("meta"),
        "raw": value,
    }
    if found and found.state in (CrewState.FAILED, CrewState.STOPPED):
        facts["error"] = shapes.error_of(source, found.state)
    elif kind == "crew":
        facts["data"] = shapes.data_of(source)
        facts["output"] = shapes.output_of(source, facts["data"]) or None
    else:
        facts["output"] = _output(source, _OUTPUTS[kind])
        facts["data"] = shapes.structured(first(source, ("output_json", "result_json")))
    return WebhookBody(**facts, tasks=shapes.tasks_of(source) if kind == "crew" else [])


def _output(source: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first text under `keys`; an object there speaks through its own text."""
    for key in keys:
        value = source.get(key)
        inner = as_object(value)
        if text := next(shapes.filled_texts(inner.get(name) for name in ("raw", "output")), shapes.text_of(value)):
            return text
    return None


def _stream(value: Any, expected: str) -> WebhookBody:
    items = as_object(value).get("events", value)
    if is_object(items):
        items = [items]
    if not isinstance(items, list) or not all(is_object(item) for item in cast("list[Any]", items)):
        raise ResponseFormatError(expected=expected, body=shown(value))
    events = [_event(as_object(item)) for item in cast("list[Any]", items)]
    if not any(event.execution_id or event.type for event in events) and events:
        raise ResponseFormatError(expected=expected, body=shown(value))
    runs = {event.execution_id for event in events}
    return WebhookBody(kind="stream", kickoff_id=runs.pop() if len(runs) == 1 else None, events=events, raw=value)


def _event(item: Mapping[str, Any]) -> StreamEvent:
    return StreamEvent(
        id=as_id(item.get("id")),
        execution_id=id_of(item, ("execution_id", "executionId", "kickoff_id", "kickoffId")),
        timestamp=shapes.text_of(item.get("timestamp")),
        type=as_text(item.get("type")),
        data=item.get("data"),
    )
