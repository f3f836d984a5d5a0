"""Batches and their rows. A row is run by attempts of the key `batch/row`; its state is that of its last attempt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import AttemptState
from prefect_crew.store.news import tell
from prefect_crew.store.schema import attempts, batches, is_current, kickoff_ids, results, rows

B = batches.c
CONFLICT: Literal["conflict"] = "conflict"
"""Rows that have completed, and whose data set has other inputs since."""
Counts = Mapping[AttemptState | Literal["conflict"] | None, int]
"""The number of rows by the state of their last attempt; None counts those without one."""
HELD_FOR = 30.0
"""Seconds after which another process may take a batch whose holder has not renewed its hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A batch. `owner` is the nonce of the process that holds it, and `passes` how often one has."""

    name: str
    crew_url: str
    call: Any
    total: int
    bad_rows: Any
    owner: str | None
    owner_seen: float
    flow_run_id: str | None
    process: str | None
    passes: int
    stopped_because: str | None
    cancelled_at: float | None
    exported: Any
    is_going: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRow:
    """A row of a data set. Its inputs are masked."""

    row_key: str
    position: int
    inputs: Mapping[str, Any]
    inputs_digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of a batch with its last attempt; without one, `state` and all that comes after it are None.

    `is_conflict`: it has completed, and the data set has other inputs since.
    """

    row_key: str
    position: int
    passes: int
    inputs: Mapping[str, Any]
    is_conflict: bool
    attempt_id: str | None
    number: int | None
    state: AttemptState | None
    kickoff_id: str | None
    error: str | None
    started_at: float | None
    ended_at: float | None
    usage: Any
    crew_version: str | None
    result: Any


@transaction("read")
def get_batch(transaction: Transaction, name: str) -> Batch | None:
    """Return a batch by its name."""
    return _get(transaction, name)


@transaction("read")
def list_batches(transaction: Transaction, limit: int = 1000) -> list[Batch]:
    """Return the batches, the one that a process held last first."""
    query = sa.select(batches).where(sa.not_(B.is_going)).order_by(B.owner_seen.desc()).limit(limit)
    return [Batch(**row) for row in transaction.connection.execute(query).mappings()]


def _get(transaction: Transaction, name: str) -> Batch | None:
    row = transaction.connection.execute(sa.select(batches).where(B.name == name)).mappings().first()
    return None if row is None else Batch(**row)


@transaction("write")
def open_batch(transaction: Transaction, name: str, *, crew_url: str, total: int) -> Batch:
    """Write a batch if there is none of its name; return the batch that is there, which may be of another crew."""
    now = transaction.lock(f"batch:{name}")
    values = {"name": name, "crew_url": crew_url, "total": total, "owner_seen": now, "passes": 0, "is_going": False}
    transaction.insert_once(batches, **values)
    batch = _get(transaction, name)
    assert batch is not None  # noqa: S101  it was written, or was there
    return batch


@transaction("write")
def change_batch(transaction: Transaction, name: str, owner: str, **values: Any) -> bool:
    """Write `call`, `total` or `bad_rows` of a batch that the owner holds."""
    transaction.lock(f"batch:{name}")
    return transaction.changed(sa.update(batches).where(B.name == name, B.owner == owner).values(values)) == 1


@transaction("write")
def note_export(transaction: Transaction, name: str, address: str) -> None:
    """Write that the file or the table of an address is this batch's."""
    transaction.lock(f"batch:{name}")
    batch = _get(transaction, name)
    known: list[str] = [] if batch is None else batch.exported or []
    if batch is not None and address not in known:
        transaction.changed(sa.update(batches).where(B.name == name).values(exported=[*known, address]))


@transaction("write")
def hold_batch(
    transaction: Transaction,
    name: str,
    owner: str,
    *,
    flow_run_id: str | None = None,
    process: str | None = None,
    dead_process: str | None = None,
) -> Batch | None:
    """Take a batch for a process, and begin a pass; return None if another process holds it.

    `dead_process`: the `process` of its holder, if the caller knows that it is gone.
    """
    now = transaction.lock(f"batch:{name}")
    is_dead = sa.false() if dead_process is None else B.process == dead_process
    is_free = sa.or_(B.owner.is_(None), B.owner == owner, B.owner_seen < now - HELD_FOR, is_dead)
    values = {"owner": owner, "owner_seen": now, "flow_run_id": flow_run_id, "process": process}
    values |= {"passes": B.passes + 1, "cancelled_at": None, "stopped_because": None}
    where = (B.name == name, is_free, sa.not_(B.is_going))
    return _get(transaction, name) if transaction.changed(sa.update(batches).where(*where).values(values)) else None


@transaction("write")
def renew_hold(transaction: Transaction, name: str, owner: str) -> Batch | None:
    """Say that the owner still holds a batch, every 10 s and before it changes a file or a table. None: it does not."""
    now = transaction.lock(f"batch:{name}")
    where = (B.name == name, B.owner == owner)
    return (
        _get(transaction, name)
        if transaction.changed(sa.update(batches).where(*where).values(owner_seen=now))
        else None
    )


@transaction("write")
def let_go(transaction: Transaction, name: str, owner: str, stopped_because: str | None = None) -> bool:
    """End the owner's hold of a batch."""
    now = transaction.lock(f"batch:{name}")
    values = {"owner": None, "owner_seen": now, "stopped_because": stopped_because}
    return transaction.changed(sa.update(batches).where(B.name == name, B.owner == owner).values(values)) == 1


@transaction("write")
def cancel_batch(transaction: Transaction, name: str) -> bool:
    """Ask the process that holds a batch to stop. Return False if nobody holds it."""
    now = transaction.lock(f"batch:{name}")
    where = (B.name == name, B.owner.is_not(None))
    if not transaction.changed(sa.update(batches).where(*where).values(cancelled_at=now)):
        return False
    tell(transaction, now, name, "cancel")
    return True


@transaction("write")
def put_rows(transaction: Transaction, name: str, owner: str, page: Sequence[NewRow]) -> bool:
    """Write a page of the data set of the owner's pass: new rows, and the place and the inputs of known ones.

    A completed row keeps the inputs of its run. Return False if the owner does not hold the batch any more.
    """
    transaction.lock(f"batch:{name}")
    batch = _get(transaction, name)
    if batch is None or batch.owner != owner:
        return False
    values = [
        {
            "batch": name,
            "row_key": row.row_key,
            "position": row.position,
            "passes": batch.passes,
            "inputs": row.inputs,
            "inputs_digest": row.inputs_digest,
        }
        for row in page
    ]
    insert = transaction.insert(rows)
    new = insert.excluded
    # As text: SQLAlchemy would put the table of the INSERT into the subquery.
    its_attempt = attempts.c.id == sa.literal_column("crew_rows.attempt_id")
    has_completed = sa.exists().where(its_attempt, attempts.c.state == AttemptState.COMPLETED)
    update = {
        "position": new.position,
        "passes": new.passes,
        "inputs": sa.case((has_completed, rows.c.inputs), else_=new.inputs),
        "inputs_digest": new.inputs_digest,
    }
    if values:
        transaction.connection.execute(
            insert.on_conflict_do_update(index_elements=["batch", "row_key"], set_=update), values
        )
    return True


@transaction("read")
def read_rows(
    transaction: Transaction,
    name: str,
    *,
    after: tuple[int, str] = (-1, ""),
    states: Collection[AttemptState | None] | None = None,
    or_conflicts: bool = False,
    with_results: bool = False,
    limit: int = 500,
) -> list[Row]:
    """Return a page of the rows of a batch, in the order of its data set. `after`: `position` and `row_key` of the last
    row of the page before. A row without an attempt has the state None. `or_conflicts`: rows in one of the states, and
    conflicts."""
    source, columns = _rows_with_attempts()
    if with_results:
        source = source.outerjoin(results, results.c.attempt_id == rows.c.attempt_id)
    columns.append(results.c.body.label("result") if with_results else sa.null().label("result"))
    place = sa.tuple_(rows.c.position, rows.c.row_key)
    query = sa.select(*columns).select_from(source).where(rows.c.batch == name)
    query = (
        query.where(place > sa.tuple_(*map(sa.literal, after))).order_by(rows.c.position, rows.c.row_key).limit(limit)
    )
    if states is not None:
        is_one = attempts.c.state.in_([state for state in states if state is not None])
        also = [rows.c.attempt_id.is_(None)] * (None in states) + [_IS_CONFLICT] * or_conflicts
        query = query.where(sa.or_(is_one, *also))
    return [Row(**row) for row in transaction.connection.execute(query).mappings()]


_IS_CONFLICT = sa.and_(attempts.c.state == AttemptState.COMPLETED, attempts.c.inputs_digest != rows.c.inputs_digest)


@transaction("read")
def rows_of_keys(transaction: Transaction, name: str, keys: Collection[str]) -> dict[str, Row]:
    """Return rows of a batch by their keys, a page of them at most."""
    source, columns = _rows_with_attempts()
    where = (rows.c.batch == name, rows.c.row_key.in_([*keys]))
    query = sa.select(*columns, sa.null().label("result")).select_from(source).where(*where)
    return {row["row_key"]: Row(**row) for row in transaction.connection.execute(query).mappings()}


def _rows_with_attempts() -> tuple[sa.FromClause, list[Any]]:
    c = attempts.c
    last_id = (
        sa.select(kickoff_ids.c.kickoff_id)
        .where(kickoff_ids.c.attempt_id == rows.c.attempt_id)
        .order_by(kickoff_ids.c.number.desc())
        .limit(1)
        .scalar_subquery()
    )
    columns: list[Any] = [rows.c.row_key, rows.c.position, rows.c.passes, rows.c.inputs, rows.c.attempt_id]
    columns += [
        sa.func.coalesce(_IS_CONFLICT, sa.false(), type_=sa.Boolean).label("is_conflict"),
        last_id.label("kickoff_id"),
    ]
    columns += [c.number, c.state, c.error, c.started_at, c.ended_at, c.usage, c.crew_version]
    return rows.outerjoin(attempts, c.id == rows.c.attempt_id), columns


@transaction("read")
def count_rows(transaction: Transaction, name: str, *, since_pass: int = 0) -> Counts:
    """Return the number of a batch's rows by state. `since_pass`: without the rows that no data set of this pass or a
    later one had."""
    c, number, is_conflict = attempts.c, sa.func.count(), _IS_CONFLICT.label("is_conflict")
    source = rows.outerjoin(attempts, c.id == rows.c.attempt_id)
    query = sa.select(c.state, is_conflict, number).select_from(source).group_by(c.state, "is_conflict")
    query = query.where(rows.c.batch == name, rows.c.passes >= since_pass)
    found = transaction.connection.execute(query).all()
    return {CONFLICT if is_conflict else state: number for state, is_conflict, number in found}


@dataclass(frozen=True, kw_only=True)
class BatchUse:
    """The use of all runs of a batch. `seconds`: the mean time of up to 1,000 completed ones, None without any."""

    runs: int
    runs_with_tokens: int
    runs_with_cost: int
    tokens: int
    cost: float
    seconds: float | None


@transaction("read")
def use_of_batch(transaction: Transaction, name: str) -> BatchUse:
    """Add up all attempts of a batch that started a run, or may have."""
    c = attempts.c
    sums = (
        sa.func.count(),
        sa.func.count(c.tokens),
        sa.func.count(c.cost),
        sa.func.coalesce(sa.func.sum(c.tokens), 0),
        sa.func.coalesce(sa.func.sum(c.cost, type_=c.cost.type), 0, type_=c.cost.type),
    )
    query = sa.select(*sums).where(c.batch == name, c.state != AttemptState.NOT_STARTED)
    runs, with_tokens, with_cost, tokens, cost = transaction.connection.execute(query).one()
    completed = (c.batch == name, is_current, c.state == AttemptState.COMPLETED)
    times = sa.select((c.ended_at - c.started_at).label("seconds")).where(*completed).limit(1000).subquery()
    seconds = transaction.connection.scalar(sa.select(sa.func.avg(times.c.seconds)))
    return BatchUse(
        runs=runs,
        runs_with_tokens=with_tokens,
        runs_with_cost=with_cost,
        tokens=int(tokens),
        cost=cost or 0.0,
        seconds=None if seconds is None else float(seconds),
    )
