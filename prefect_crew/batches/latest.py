"""Which attempt of a row counts, in SQL and in Python: its last purchase, else its last attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Subquery, case, func, select

from prefect_crew.api.models import CrewState
from prefect_crew.batches.database import attempts
from prefect_crew.records import RecordPhase

__all__ = ["Place", "latest", "places", "places_of_row", "standing_attempts"]

_REFUSED = str(RecordPhase.NOT_STARTED)


class Place(NamedTuple):
    """Where one attempt stands: the words of the ledger's columns."""

    row_key: str
    attempt: int
    phase: str
    state: str | None

    @property
    def counts(self) -> bool:
        """Whether it is, or may be, a purchase."""
        return self.phase != _REFUSED

    @property
    def completed(self) -> bool:
        """Whether it has a result as it was asked for."""
        return self.state == str(CrewState.COMPLETED)


def latest(places: Sequence[Place]) -> dict[str, Place]:
    """Return the attempt that counts of each row, of attempts in order."""
    found: dict[str, Place] = {}
    for place in places:
        if place.counts or not (place.row_key in found and found[place.row_key].counts):
            found[place.row_key] = place
    return found


def places(batch: str, after: str) -> Any:
    """Return the query for where all attempts stand of rows whose keys come after one, in the order of the keys."""
    columns = (attempts.c.row_key, attempts.c.attempt, attempts.c.phase, attempts.c.state)
    query = select(*columns).where(attempts.c.batch == batch, attempts.c.row_key > after)
    return query.order_by(attempts.c.row_key, attempts.c.attempt)


def places_of_row(batch: str, row_key: str, *, after: int) -> Any:
    """Return the query for the attempts at one row that come after one."""
    columns = (attempts.c.row_key, attempts.c.attempt, attempts.c.phase, attempts.c.state)
    row = (attempts.c.batch == batch, attempts.c.row_key == row_key, attempts.c.attempt > after)
    return select(*columns).where(*row).order_by(attempts.c.attempt)


def standing_attempts(batch: str, *columns: Any) -> Subquery:
    """Return columns of all attempts of a batch, and `place`, which is 1 for that which counts of each row.

    Not by a look for a later attempt at each: PostgreSQL takes a table that grows for a small one until it is analyzed,
    and goes through all of it for every row (19 s for 2,300).
    """
    refused = case((attempts.c.phase == _REFUSED, 1), else_=0)
    place = func.row_number().over(partition_by=attempts.c.row_key, order_by=(refused, attempts.c.attempt.desc()))
    return select(*columns, place.label("place")).where(attempts.c.batch == batch).subquery()
