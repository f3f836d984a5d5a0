"""What a delivery to a webhook tells, cut down to what may stand in an event. Pure.

A body is never believed: which run it is about stands in the signed URL, and what the body says of itself is passed on
as said. Outputs, thoughts, errors, descriptions, inputs and `meta` stay behind, since any of them may hold a secret
that only the caller could have masked. What a person is to judge goes apart from the event, to where secrets are kept,
and only of a run whose crew has no secret inputs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect_crew.api._decode import as_count, as_object
from prefect_crew.api.models import StreamEvent, WebhookBody
from prefect_crew.receiver.signing import Hook

__all__ = ["MAX_STREAMED", "News", "Rank", "digest_of", "news_of"]

MAX_STREAMED = 200
"""Events of one stream delivery that are passed on."""
_MAX_ID = 300
_MAX_NAME = 100
_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_TIME = re.compile(r"[\d.:+TZ -]{1,40}", re.ASCII)
_TYPE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")
_ENDS = re.compile(
    r"(crew|flow)(_kickoff|_execution)?_(completed|failed|finished|paused|stopped)|method_execution_failed|.*human_.*"
)
"""Types of streamed events that say as much as a crew or human-input webhook."""


class Rank(IntEnum):
    """What is given up first when there is too much: the lowest."""

    STEP = 0
    STREAM = 1
    TASK = 2
    CREW = 3
    """The end of a run, or a question to a person: what somebody waits for."""


_RANKS = {"step": Rank.STEP, "task": Rank.TASK, "crew": Rank.CREW, "human_input": Rank.CREW}


@dataclass(frozen=True)
class News:
    """One event to be.

    `name` follows `crew.webhook.`. `said` is what the body says, by nobody confirmed. `id` is the same for the same
    delivery, so that the server keeps one of two. `said_run_key` is the run key in the body's `meta`, if it has one.
    `output` is what a person is to judge.
    """

    hook: Hook
    name: str
    rank: Rank
    id: UUID
    received: datetime
    said: Mapping[str, Any]
    kickoff_id: str | None = None
    said_run_key: str | None = None
    output: str | None = field(default=None, repr=False)


def digest_of(hook: Hook, body: bytes) -> bytes:
    """Return what tells one delivery from another: equal for the same body at the same URL."""
    facts = repr((hook.kind, hook.run_key, hook.attempt, hook.round)).encode("utf-8", "surrogatepass")
    return hashlib.sha256(facts + b"\0" + body).digest()


def news_of(hook: Hook, body: WebhookBody, *, digest: bytes, received: datetime) -> list[News]:
    """Return what a delivery tells: one piece of news, or one for each event of a stream up to `MAX_STREAMED`."""
    if hook.kind == "stream":
        return [
            _streamed(hook, event, digest, number, received) for number, event in enumerate(body.events[:MAX_STREAMED])
        ]
    said: dict[str, Any] = {
        "kickoff_id": _id(hook, body.kickoff_id),
        "task_id": _id(hook, body.task_id),
        "state": str(body.state) if body.state else None,
        "execution_time": body.execution_time,
        "total_tokens": body.usage.total_tokens if body.usage else None,
    }
    if hook.names:
        said |= {"name": body.name, "agent": body.agent, "tool": body.tool, "step_type": body.step_type}
    return [
        News(
            hook=hook,
            name=hook.kind,
            rank=_RANKS[hook.kind],
            id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/{digest.hex()}"),
            received=received,
            said=dict(_filled(said)),
            kickoff_id=body.kickoff_id,
            said_run_key=_run_key(body.meta),
            output=body.output if hook.kind == "human_input" and hook.names else None,
        )
    ]


def _streamed(hook: Hook, event: StreamEvent, digest: bytes, number: int, received: datetime) -> News:
    lowered = (event.type or "").lower()
    type_ = lowered if _TYPE.fullmatch(lowered) else "other"
    data = as_object(event.data)
    said: dict[str, Any] = {
        "id": _id(hook, event.id),
        "kickoff_id": _id(hook, event.execution_id),
        "at": event.timestamp if hook.names or _TIME.fullmatch(event.timestamp or "") else None,
    }
    said["total_tokens"] = as_count(data.get("total_tokens"))
    if hook.names:
        said |= {"name": data.get("task_name"), "agent": data.get("agent_role")}
    # An event that comes once more in another batch is still the same.
    same = f"{hook.run_key}/{hook.attempt}/{event.execution_id}/{event.id}" if event.id else f"{digest.hex()}/{number}"
    return News(
        hook=hook,
        name=f"stream.{type_}",
        rank=Rank.CREW if _ENDS.fullmatch(type_) else Rank.STREAM,
        id=uuid5(NAMESPACE_URL, f"prefect-crew/webhook/stream/{type_}/{same}"),
        received=received,
        said=dict(_filled(said)),
        kickoff_id=event.execution_id,
        said_run_key=_run_key(data.get("meta")),
    )


def _filled(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, str):
            # Ids are whole or absent: half an id is another id.
            text = value if key.endswith("id") else " ".join(value.split())[:_MAX_NAME]
            if text:
                yield key, text
        elif isinstance(value, int | float):
            yield key, value


def _id(hook: Hook, value: str | None) -> str | None:
    """Return an id; None for what may be a sentence with a secret in it, where the crew has secret inputs."""
    if value is None or len(value) > _MAX_ID:
        return None
    return value if hook.names or _ID.fullmatch(value) else None


def _run_key(meta: Any) -> str | None:
    key = as_object(meta).get("run_key")
    return key if isinstance(key, str) else None
