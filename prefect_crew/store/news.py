"""News: rows that end the pause of a wait before its time. A process reads the new ones for all its waits at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.schema import news

REACH_BACK = 10.0
"""Seconds by which a reader looks back: PostgreSQL may show a row after others that came later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """One event for a wait. `topic`: an attempt's id, or a batch's name. `number`: of the question whose answer the
    webhook's URL came after."""

    n: int
    topic: str
    received_at: float
    kind: str
    number: int | None
    kickoff_id: str | None
    body: Any


@dataclass(frozen=True)
class Place:
    """How far a reader has read: the time, and the rows of the last seconds, each with its own time."""

    at: float
    read: Mapping[int, float] = field(default_factory=dict[int, float])


def tell(transaction: Transaction, now: float, topic: str, kind: str, **values: Any) -> None:
    """Write news in a transaction that has something to tell."""
    transaction.connection.execute(sa.insert(news).values(topic=topic, kind=kind, received_at=now, **values))


@transaction("read")
def read_news(transaction: Transaction, topics: Collection[str], place: Place | None) -> tuple[list[News], Place]:
    """Return the news of some topics since a place, and the new place. Without one, those of the last seconds."""
    now, c = transaction.now(), news.c
    place = place or Place(now)
    where = (c.received_at > place.at - REACH_BACK, c.topic.in_([*topics]), c.n.not_in([*place.read]))
    query = sa.select(news).where(*where).order_by(c.n)
    fresh = [News(**row) for row in transaction.connection.execute(query).mappings()]
    read = {**place.read, **{event.n: event.received_at for event in fresh}}
    return fresh, Place(now, {n: at for n, at in read.items() if at > now - REACH_BACK})
