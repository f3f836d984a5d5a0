"""The crew workers, and the flow runs that each of them holds."""

from __future__ import annotations

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.schema import held, workers

W = workers.c
DEAD_AFTER = 3
"""Heartbeats without a sign of life after which others take a worker's flow runs over: 90 s with Prefect's 30 s."""


def _has_successor() -> sa.ColumnElement[bool]:
    newer = workers.alias()
    same = [newer.c[name] == W[name] for name in ("pool", "name", "host")]
    return sa.exists().where(*same, newer.c.begun_at > W.begun_at).correlate(workers)


@transaction("write")
def beat(transaction: Transaction, boot: str, pool: str, name: str, host: str, heartbeat: float) -> bool:
    """Say that a worker lives. `heartbeat`: the seconds of one. Return whether a later one has its name and its host:
    then that one takes over its flow runs, and it has to take another name."""
    now = transaction.lock()
    values = {"pool": pool, "name": name, "host": host, "dead_at": now + DEAD_AFTER * heartbeat}
    statement = transaction.insert(workers).values(boot=boot, begun_at=now, seen_since=now, **values)
    seen_since = sa.case((W.dead_at <= now, now), else_=W.seen_since)
    changes = values | {"seen_since": seen_since}
    transaction.connection.execute(statement.on_conflict_do_update(index_elements=["boot"], set_=changes))
    return bool(transaction.connection.scalar(sa.select(_has_successor()).where(W.boot == boot)))


@transaction("write")
def retire(transaction: Transaction, boot: str) -> None:
    """Say that a worker ends: others may at once take over what it still holds."""
    now = transaction.lock()
    transaction.changed(sa.update(workers).where(W.boot == boot).values(dead_at=now))


@transaction("write")
def hold(transaction: Transaction, flow_run_id: str, boot: str) -> bool:
    """Write, before a flow run is Pending, that a worker holds it. Return False if another one does, or if this worker
    counts as dead: then others would take the flow run over at once."""
    now = transaction.lock()
    is_alive = sa.exists().where(W.boot == boot, W.dead_at > now)
    if not transaction.connection.scalar(sa.select(is_alive)):
        return False
    transaction.insert_once(held, flow_run_id=flow_run_id, boot=boot)
    return _holder(transaction, flow_run_id) == boot


@transaction("write")
def release(transaction: Transaction, flow_run_id: str, boot: str) -> bool:
    """Say that a worker does not hold a flow run any more."""
    transaction.lock()
    return transaction.changed(sa.delete(held).where(held.c.flow_run_id == flow_run_id, held.c.boot == boot)) == 1


@transaction("write")
def take_over(transaction: Transaction, boot: str, heartbeat: float) -> int:
    """Let a worker hold the flow runs of the dead workers of its pool. Return their number.

    A worker is dead that was silent for three heartbeats, or of whose name a later one has begun on its host. For one
    heartbeat after its own silence a worker takes nothing from silent ones: all may have been cut off or asleep.
    """
    now, own = transaction.lock(), workers.alias()
    is_silent = sa.and_(W.dead_at <= now, own.c.seen_since <= now - heartbeat)
    dead = sa.select(W.boot).join(own, sa.and_(own.c.boot == boot, own.c.pool == W.pool))
    dead = dead.where(W.boot != boot, sa.or_(is_silent, _has_successor()))
    return transaction.changed(sa.update(held).where(held.c.boot.in_(dead)).values(boot=boot))


@transaction("read")
def held_by(transaction: Transaction, boot: str) -> list[str]:
    """Return the flow runs that a worker holds."""
    return [*transaction.connection.scalars(sa.select(held.c.flow_run_id).where(held.c.boot == boot))]


@transaction("read")
def holder(transaction: Transaction, flow_run_id: str) -> str | None:
    """Return the worker that holds a flow run."""
    return _holder(transaction, flow_run_id)


def _holder(transaction: Transaction, flow_run_id: str) -> str | None:
    return transaction.connection.scalar(sa.select(held.c.boot).where(held.c.flow_run_id == flow_run_id))
