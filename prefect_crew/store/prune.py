"""Deleting what is old, in pieces that others hardly notice; and the counts of what is there."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import AttemptState
from prefect_crew.store.schema import METADATA, attempts, batches, held, news, rows, spending, store, workers
from prefect_crew.store.spending import day_of

A = attempts.c
B = batches.c
PIECE = 200
"""Keys, or rows of a batch, that one transaction deletes."""
DAY = 86_400.0
LONGEST_MONTH = 62 * DAY
"""Sums of a month are limited by budgets, whatever is kept."""
IS_OPEN = [AttemptState.POSTING, AttemptState.BACKING_OFF, AttemptState.UNCERTAIN, AttemptState.STARTED]


def _old_keys(before: float) -> Any:
    """Select the keys whose attempts have all ended before a time, but not that of the last completed turn of a
    session: it says how the session goes on. Rows go with their batch."""
    of_key, later = attempts.alias(), attempts.alias()
    is_late = sa.or_(of_key.c.ended_at.is_(None), of_key.c.ended_at >= before)
    is_in_session = (later.c.crew_url == of_key.c.crew_url, later.c.session == of_key.c.session)
    has_later = sa.exists().where(*is_in_session, later.c.state == AttemptState.COMPLETED, later.c.turn > of_key.c.turn)
    is_completed_turn = sa.and_(of_key.c.session.is_not(None), of_key.c.state == AttemptState.COMPLETED)
    is_last_turn = sa.and_(is_completed_turn, ~has_later.correlate(of_key))
    is_kept = sa.exists().where(of_key.c.key == A.key, sa.or_(is_late, is_last_turn)).correlate(attempts)
    return sa.select(A.key).where(A.ended_at < before, A.batch.is_(None), ~is_kept).distinct()


@transaction("read")
def keys_to_prune(transaction: Transaction, before: float) -> list[str]:
    """Return some keys that `prune_keys` would delete."""
    return [*transaction.connection.scalars(_old_keys(before).limit(PIECE))]


@transaction("write")
def prune_keys(transaction: Transaction, keys: list[str], before: float) -> int:
    """Delete the attempts of keys, with their results and questions. A key that has changed since stays. Return the
    number of attempts."""
    transaction.lock(*(f"key:{key}" for key in keys))
    return transaction.changed(sa.delete(attempts).where(A.key.in_(keys), A.key.in_(_old_keys(before))))


def _is_old_batch(before: float) -> tuple[sa.ColumnElement[bool], ...]:
    open_runs = sa.exists().where(A.batch == B.name, A.state.in_(IS_OPEN)).correlate(batches)
    return B.owner.is_(None), B.owner_seen < before, ~open_runs


@transaction("write")
def prune_batch(transaction: Transaction, before: float) -> str | None:
    """Delete a piece of a batch that nobody has held since a time, and none of whose runs is open. Return its name if
    there is more of it to delete, or None if there is no such batch."""
    transaction.lock("prune")
    name = transaction.connection.scalar(sa.select(B.name).where(B.is_going).limit(1))
    if name is None:
        where = _is_old_batch(before)
        name = transaction.connection.scalar(sa.select(B.name).where(*where).limit(1))
        if name is None or not transaction.changed(
            sa.update(batches).where(B.name == name, *where).values(is_going=True)
        ):
            return None
        return name
    for table, column in ((attempts, A.id), (rows, rows.c.row_key)):
        piece = sa.select(column).where(table.c.batch == name).limit(PIECE)
        if transaction.changed(sa.delete(table).where(table.c.batch == name, column.in_(piece))):
            return name
    transaction.changed(sa.delete(batches).where(B.name == name))
    return name


@transaction("write")
def prune_rest(transaction: Transaction, before: float) -> None:
    """Delete news and workers of yesterday, and sums that no budget asks for any more: those of a batch that is there
    stay."""
    now = transaction.lock("prune")
    transaction.changed(sa.delete(news).where(news.c.received_at < now - DAY))
    holds = sa.exists().where(held.c.boot == workers.c.boot).correlate(workers)
    transaction.changed(sa.delete(workers).where(workers.c.dead_at < now - DAY, ~holds))
    # A budget per batch ends its scope so. Not LIKE: a name may hold its signs.
    scope, end = spending.c.scope, sa.literal(" of ") + B.name
    is_of_batch = sa.func.substr(scope, sa.func.length(scope) - sa.func.length(end) + 1) == end
    goes_on = sa.exists().where(is_of_batch).correlate(spending)
    old = spending.c.day < day_of(min(before, now - LONGEST_MONTH))
    transaction.changed(sa.delete(spending).where(old, ~goes_on))


@transaction("read")
def counts(transaction: Transaction) -> dict[str, int]:
    """Return the number of rows of each table."""
    return {
        name.removeprefix("crew_"): transaction.connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
        for name, table in METADATA.tables.items()
        if table is not store
    }


@transaction("read")
def size(transaction: Transaction) -> int:
    """Return the bytes that the tables and their indexes take."""
    if transaction.connection.dialect.name == "sqlite":
        query = sa.text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
    else:
        sizes = (sa.func.pg_total_relation_size(name) for name in METADATA.tables)
        query = sa.select(sum(sizes, sa.literal(0)))
    return int(transaction.connection.scalar(query) or 0)
