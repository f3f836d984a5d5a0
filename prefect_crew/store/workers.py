"""The crew workers, and the flow runs that each of them holds."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.schema import held, workers

W = workers.c
DEAD_AFTER = 90.0
"""Seconds without a sign of life after which others take over the flow runs of a worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One start of a worker. `boot` is its nonce."""

    boot: str
    name: str
    host: str
    begun_at: float
    seen_at: float


@transaction("write")
def beat(transaction: Transaction, boot: str, name: str, host: str) -> None:
    """Say that a worker lives."""
    now = transaction.lock()
    values = {"boot": boot, "name": name, "host": host, "begun_at": now, "seen_at": now}
    statement = transaction.insert(workers).values(values)
    transaction.connection.execute(statement.on_conflict_do_update(index_elements=["boot"], set_={"seen_at": now}))


@transaction("write")
def hold(transaction: Transaction, flow_run_id: str, boot: str) -> bool:
    """Write, before a flow run is Pending, that a worker holds it. Return False if another one does."""
    transaction.lock()
    if transaction.insert_once(held, flow_run_id=flow_run_id, boot=boot):
        return True
    return transaction.connection.scalar(sa.select(held.c.boot).where(held.c.flow_run_id == flow_run_id)) == boot


@transaction("write")
def release(transaction: Transaction, flow_run_id: str, boot: str) -> bool:
    """Say that a worker does not hold a flow run any more."""
    transaction.lock()
    return transaction.changed(sa.delete(held).where(held.c.flow_run_id == flow_run_id, held.c.boot == boot)) == 1


def _is_dead(now: float) -> sa.ColumnElement[bool]:
    """The condition that a worker was not seen for long, or that a later one has its name and its host."""
    newer = workers.alias()
    successor = (newer.c.name == W.name, newer.c.host == W.host, newer.c.begun_at > W.begun_at)
    return sa.or_(W.seen_at < now - DEAD_AFTER, sa.exists().where(*successor).correlate(workers))


@transaction("read")
def left_behind(transaction: Transaction) -> list[tuple[str, Worker]]:
    """Return the flow runs of dead workers, each with its worker."""
    query = sa.select(held.c.flow_run_id, *workers.columns).join(workers, W.boot == held.c.boot)
    rows = transaction.connection.execute(query.where(_is_dead(transaction.now()))).mappings()
    return [(row["flow_run_id"], Worker(**{name: row[name] for name in Worker.__slots__})) for row in rows]


@transaction("write")
def take_over(transaction: Transaction, flow_run_id: str, dead: str, boot: str) -> bool:
    """Take a flow run from a dead worker. Return False if another worker was faster, or the worker lives."""
    now = transaction.lock()
    is_dead = sa.exists().where(W.boot == dead, _is_dead(now))
    where = (held.c.flow_run_id == flow_run_id, held.c.boot == dead, is_dead)
    return transaction.changed(sa.update(held).where(*where).values(boot=boot)) == 1


@transaction("read")
def held_by(transaction: Transaction, boot: str) -> list[str]:
    """Return the flow runs that a worker holds."""
    return [*transaction.connection.scalars(sa.select(held.c.flow_run_id).where(held.c.boot == boot))]
