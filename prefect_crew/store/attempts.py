"""The life of an attempt: each change is one transaction, which says in its WHERE what it expects to find.

A function that returns False, or an attempt in another state than it was asked to write, changed nothing: somebody else
has moved the attempt. Read it again and decide again.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import (
    PREPARING,
    SEND_WITHIN,
    SPARE,
    STARTS,
    Attempt,
    AttemptState,
    Decision,
    Request,
    Step,
    decide,
    is_own,
)
from prefect_crew.store.schema import attempts, batches, kickoff_ids, results, rows
from prefect_crew.store.spending import book, close, day_of, overruns

A = attempts.c
S = AttemptState
Ending = Literal[S.COMPLETED, S.FAILED, S.STOPPED]
_IDS = sa.select(kickoff_ids.c.kickoff_id).where(kickoff_ids.c.attempt_id == A.id)
_FIRST_ID = _IDS.where(kickoff_ids.c.number == 1).scalar_subquery().label("first_id")
_LAST_ID = _IDS.order_by(kickoff_ids.c.number.desc()).limit(1).scalar_subquery().label("kickoff_id")
# Statements that every run needs are made once: SQLAlchemy takes longer to make one than to execute it.
_ATTEMPT = sa.select(*attempts.columns, _FIRST_ID, _LAST_ID)
_BY_ID = _ATTEMPT.where(A.id == sa.bindparam("id"))
_BY_KEY = _ATTEMPT.where(A.key == sa.bindparam("key")).order_by(A.number)
_LOCKED = _BY_ID.with_for_update(of=attempts)
# The state as a literal, as in the index. One that another transaction is about to change need not be waited for.
_GIVEN_UP = _ATTEMPT.where(
    A.state == sa.literal_column("'backing_off'"), A.deadline <= sa.bindparam("now")
).with_for_update(of=attempts, skip_locked=True)


def _read(transaction: Transaction, query: sa.Executable, **binds: Any) -> list[Attempt]:
    found = transaction.connection.execute(query, binds)
    names = tuple(found.keys())
    return [Attempt(**dict(zip(names, row, strict=True))) for row in found]


def _get(transaction: Transaction, attempt_id: str) -> Attempt | None:
    return next(iter(_read(transaction, _BY_ID, id=attempt_id)), None)


@cache
def _update(guards: tuple[str, ...], columns: tuple[str, ...]) -> sa.Update:
    conditions = {
        "preparing_at": sa.and_(A.state.in_(PREPARING), A.deadline > sa.bindparam("if_preparing_at")),
        "kickoff_id": _LAST_ID.element == sa.bindparam("if_kickoff_id"),
    }
    where = (conditions[name] if name in conditions else A[name] == sa.bindparam(f"if_{name}") for name in guards)
    return sa.update(attempts).where(*where).values({name: sa.bindparam(f"to_{name}") for name in columns})


def _change(transaction: Transaction, guards: Mapping[str, Any], **values: Any) -> bool:
    """Change the attempt with these values, where `preparing_at` is a time before its deadline and `kickoff_id` its
    last id. Return whether there is one."""
    binds = {f"if_{name}": value for name, value in guards.items()}
    binds |= {f"to_{name}": value for name, value in values.items()}
    return transaction.changed(_update((*guards,), (*values,)), **binds) == 1


def _key_lock(key: str) -> str:
    return f"key:{key}"


# Start


@transaction("read", started="no")
def look(transaction: Transaction, request: Request) -> Decision:
    """Return what a call does next, without a lock and without a change."""
    now = transaction.now()
    return decide(_read(transaction, _BY_KEY, key=request.key), request, now)


@transaction("begin", started="no")
def begin(transaction: Transaction, request: Request) -> Decision:
    """Decide again, under a lock, and write the attempt if the call starts a run: it is then `posting`, and the caller
    sends the kickoff within `SEND_WITHIN` from before this call, or says `not_started`.

    A call that lost the answer of an earlier `begin` gets the attempt of that one. It first ends all attempts that were
    left in a pause, of any key: else they would hold the room of a limit, a budget or a session.
    """
    names = [_key_lock(request.key), *(f"scope:{allowance.scope}" for allowance in request.allowances)]
    if request.limit is not None:
        names.append(f"crew:{request.crew_url}")
    if request.session is not None:
        names.append(f"session:{request.crew_url} {request.session}")
    now = transaction.lock(*names)
    for attempt in _read(transaction, _GIVEN_UP, now=now):
        _end_unsent(transaction, attempt, now)
    before = _read(transaction, _BY_KEY, key=request.key)
    decision = decide(before, request, now)
    for attempt in [one for one in before if is_own(one, request)]:
        if not attempt.is_free(now) and decision.step in STARTS:
            window: dict[str, Any] = dict.fromkeys(("deadline", "counts_until"), _deadline(now, request))
            _change(transaction, {"id": attempt.id}, state=S.POSTING, **window)
            return replace(decision, attempt=replace(attempt, state=S.POSTING, **window))
        _end_unsent(transaction, attempt, now)
    if decision.step not in STARTS:
        return decision
    refusal, turn, restored = _refuse_limit(transaction, request, now), None, None
    if refusal is None and request.session is not None:
        refusal, turn, restored = _take_turn(transaction, request, now)
    if refusal is not None:
        return refusal
    full = overruns(transaction, request.allowances, now)
    if any(not overrun.allowance.is_warning for overrun in full):
        return Decision(step=Step.OVER_BUDGET, now=now, overruns=full)
    attempt_id = uuid.uuid4().hex
    row = {"of_batch": request.batch, "of_row": request.row_key, "of_owner": request.batch_owner, "attempt": attempt_id}
    if request.batch is not None and not transaction.changed(_SET_ROW, **row):
        return Decision(step=Step.NOT_HELD, now=now)
    attempt = _insert(transaction, request, before, now, id=attempt_id, turn=turn, restored=restored)
    return replace(decision, attempt=attempt, overruns=full)


def _deadline(now: float, request: Request) -> float:
    return now + SEND_WITHIN + request.post_seconds + SPARE


def _refuse_limit(transaction: Transaction, request: Request, now: float) -> Decision | None:
    if request.limit is None:
        return None
    in_flight = (A.crew_url == request.crew_url, A.ended_at.is_(None), A.counts_until > now)
    count = transaction.connection.scalar(sa.select(sa.func.count()).select_from(attempts).where(*in_flight)) or 0
    return Decision(step=Step.FULL, now=now) if count >= request.limit else None


_SAME = [each.name for each in fields(Request) if each.name in A]
_EMPTY: dict[str, Any] = dict.fromkeys(Attempt.__slots__)
_INSERT = sa.insert(attempts)
_IS_HELD = sa.exists().where(batches.c.name == sa.bindparam("of_batch"), batches.c.owner == sa.bindparam("of_owner"))
_SET_ROW = (
    sa.update(rows)
    .where(rows.c.batch == sa.bindparam("of_batch"), rows.c.row_key == sa.bindparam("of_row"), _IS_HELD)
    .values(attempt_id=sa.bindparam("attempt"))
)


def _take_turn(
    transaction: Transaction, request: Request, now: float
) -> tuple[Decision | None, int | None, str | None]:
    """Return the refusal, or the number of the next turn of a session and the kickoff id that it goes on from."""
    in_session = (A.crew_url == request.crew_url, A.session == request.session)
    last_number = transaction.connection.scalar(sa.select(sa.func.max(A.turn)).where(*in_session)) or 0
    latest = _ATTEMPT.where(*in_session, A.state != S.NOT_STARTED).order_by(A.turn.desc()).limit(1)
    last = next(iter(_read(transaction, latest)), None)
    if last is None:
        return None, last_number + 1, None
    if last.ended_at is None:
        return Decision(step=Step.TURN, now=now, attempt=last), None, None
    # A failed turn is not built on.
    return None, last_number + 1, last.first_id if last.state is S.COMPLETED else last.restored


def _insert(
    transaction: Transaction,
    request: Request,
    before: Sequence[Attempt],
    now: float,
    **own: Any,
) -> Attempt:
    deadline = _deadline(now, request)
    estimates = {each.scope: (each.estimate_tokens, each.estimate_cost) for each in request.allowances}
    values = {name: getattr(request, name) for name in _SAME}
    values |= {"number": before[-1].number + 1 if before else 1, "state": S.POSTING}
    values |= {"input_digests": dict(request.input_digests) or None, "secret_names": [*request.secret_names] or None}
    values |= {"replaced": False, "begun_at": now, "deadline": deadline, "counts_until": deadline, "human_seconds": 0.0}
    values |= {"estimates": estimates or None, **own}
    attempt = Attempt(**_EMPTY | values)
    if before:
        transaction.changed(sa.update(attempts).where(A.key == request.key).values(replaced=True))
    transaction.connection.execute(_INSERT, values)
    book(transaction, attempt.estimates, day_of(now))
    return attempt


@transaction("write", started="no")
def back_off(transaction: Transaction, attempt: Attempt, pause: float) -> bool:
    """Say that an answer surely started nothing, and that the owner sends the kickoff again after a pause (seconds).

    Return False if it is too late. Right before the next kickoff the owner asks `go_on`.
    """
    return _renew(transaction, attempt, S.BACKING_OFF, pause + SEND_WITHIN)


@transaction("write", started="no")
def go_on(transaction: Transaction, attempt: Attempt, post_seconds: float) -> bool:
    """Give the owner a window to send the kickoff, after a pause or with a renewed token. Return False if too late."""
    return _renew(transaction, attempt, S.POSTING, SEND_WITHIN + post_seconds + SPARE)


def _renew(transaction: Transaction, attempt: Attempt, state: AttemptState, seconds: float) -> bool:
    now = transaction.lock(_key_lock(attempt.key))
    guards = {"id": attempt.id, "owner": attempt.owner, "preparing_at": now}
    return _change(transaction, guards, state=state, deadline=now + seconds, counts_until=now + seconds)


@transaction("write", started="no")
def not_started(transaction: Transaction, key: str, owner: str, reason: str | None = None) -> bool:
    """Say, as its owner, that a kickoff surely started nothing, and why. The call may not know its attempt, if it was
    cancelled in `begin`."""
    now = transaction.lock(_key_lock(key))
    attempts_ = _read(transaction, _BY_KEY, key=key)
    own = (attempt for attempt in attempts_ if attempt.owner == owner and attempt.state in PREPARING)  # at most one
    return any(_end_unsent(transaction, attempt, now, reason=reason) for attempt in own)


def _end_unsent(
    transaction: Transaction, attempt: Attempt, now: float, by: str | None = None, reason: str | None = None
) -> bool:
    """Write that an attempt started nothing, if it is in the state that the caller read."""
    guards = {"id": attempt.id, "state": attempt.state}
    values = {"state": S.NOT_STARTED, "ended_at": now, "deadline": None, "resolved_by": by, "error": reason}
    if not _change(transaction, guards, **values):
        return False
    book(transaction, attempt.estimates, day_of(attempt.begun_at), sign=-1)
    return True


@transaction("write")
def uncertain(transaction: Transaction, attempt: Attempt, reason: str) -> bool:
    """Say, as its owner, that nobody knows whether the kickoff started a run, and why. The deadline stays: the network
    may still deliver the request."""
    transaction.lock(_key_lock(attempt.key))
    guards = {"id": attempt.id, "owner": attempt.owner, "state": S.POSTING}
    return _change(transaction, guards, state=S.UNCERTAIN, error=reason)


# In flight


@dataclass(frozen=True, kw_only=True)
class Started:
    """The attempt after `started` or `resolve`; None if it was pruned.

    `other_key`: the id belongs to an attempt of that key, so this attempt stays or becomes uncertain. `second`: the key
    has another run, with this id, or of a later attempt that has none yet. Both are mistakes of somebody, to be shown.
    """

    attempt: Attempt | None
    other_key: str | None = None
    second: str | None = None


@transaction("write", started="yes")
def started(transaction: Transaction, attempt: Attempt, kickoff_id: str, timeout: float) -> Started:
    """Write the kickoff id of an attempt: from the answer to the kickoff, a webhook, or a status that names the key.

    An id is evidence: it counts at once, and more than somebody's word that nothing was started. An attempt that has an
    id keeps it. `timeout`: seconds for which the run holds its slot, if nobody reattaches.
    """
    return _start(transaction, attempt, kickoff_id, timeout, transaction.lock(_key_lock(attempt.key)))


def _start(
    transaction: Transaction, attempt: Attempt, kickoff_id: str, timeout: float, now: float, by: str | None = None
) -> Started:
    current = next(iter(_read(transaction, _LOCKED, id=attempt.id)), None)  # a `begin` of any key may end it
    if current is None or current.kickoff_id is not None:
        is_its = current is None or kickoff_id in ids_of(transaction, current.id)
        return Started(attempt=current, second=None if is_its else kickoff_id)
    guards = {"id": current.id, "state": current.state}
    if (other_key := _claim_id(transaction, current, kickoff_id)) is not None:
        reason = f"the crew's server answered with run {kickoff_id}, which belongs to idempotency key {other_key!r}"
        if current.state in PREPARING:
            _change(transaction, guards, state=S.UNCERTAIN, error=reason)
            current = replace(current, state=S.UNCERTAIN, error=reason)
        return Started(attempt=current, other_key=other_key)
    values: dict[str, Any] = {"state": S.STARTED, "started_at": now, "ended_at": None, "deadline": None}
    values |= {"counts_until": now + timeout, "resolved_by": by, "error": None}
    _change(transaction, guards, **values)
    if current.state is S.NOT_STARTED:
        book(transaction, current.estimates, day_of(current.begun_at))
    current = replace(current, first_id=kickoff_id, kickoff_id=kickoff_id, **values)
    last = _read(transaction, _BY_KEY, key=current.key)[-1] if current.replaced else None
    return Started(attempt=current, second=last and (last.first_id or f"attempt {last.number}"))


def _claim_id(transaction: Transaction, attempt: Attempt, kickoff_id: str) -> str | None:
    """Write an id of an attempt. Return the key of another attempt that has it."""
    number = 1
    if attempt.kickoff_id is not None:
        number += (
            transaction.connection.scalar(sa.select(sa.func.count()).where(kickoff_ids.c.attempt_id == attempt.id)) or 0
        )
    values = {"crew_url": attempt.crew_url, "kickoff_id": kickoff_id, "attempt_id": attempt.id, "number": number}
    if transaction.insert_once(kickoff_ids, **values):
        return None
    ids = kickoff_ids.c
    holders = sa.select(A.id, A.key).join(kickoff_ids, ids.attempt_id == A.id)
    same_id = (ids.crew_url == attempt.crew_url, ids.kickoff_id == kickoff_id)
    holder = transaction.connection.execute(holders.where(*same_id)).first()
    if holder is None:  # it was pruned at this moment
        return _claim_id(transaction, attempt, kickoff_id)
    return None if holder.id == attempt.id else holder.key


@transaction("write", started="yes")
def continued(transaction: Transaction, attempt: Attempt, kickoff_id: str) -> Started:
    """Write that the run goes on under one more id, which is polled from now on: `/resume` or a webhook named it."""
    transaction.lock(_key_lock(attempt.key))
    current = _get(transaction, attempt.id)
    if current is None or current.state is not S.STARTED:
        return Started(attempt=current)
    other_key = _claim_id(transaction, current, kickoff_id)
    return Started(attempt=_get(transaction, attempt.id), other_key=other_key)


@transaction("write", started="yes")
def waited_for(
    transaction: Transaction, attempt: Attempt, timeout: float, *, is_human: bool | None = None
) -> Attempt | None:
    """Say that somebody waits for a run for up to `timeout` seconds more: it holds its slot as long.

    `is_human`: whether the run waits for a person from now on, or not any more. Return the attempt as it is now.
    """
    now = transaction.lock(_key_lock(attempt.key))
    current = _get(transaction, attempt.id)
    if current is None or current.ended_at is not None:
        return current
    values: dict[str, Any] = {"counts_until": max(current.counts_until, now + timeout)}
    if is_human is not None:
        values["human_since"] = (current.human_since or now) if is_human else None
        if current.human_since is not None and not is_human:
            values["human_seconds"] = current.human_seconds + now - current.human_since
    _change(transaction, {"id": attempt.id, "state": current.state}, **values)
    return replace(current, **values)


@transaction("write")
def ask_to_stop(transaction: Transaction, attempt: Attempt, by: str) -> bool:
    """Take the right to send `POST /stop`, once for all callers. `by`: a person, or `TIMEOUT`."""
    now = transaction.lock(_key_lock(attempt.key))
    is_free = sa.or_(A.stop_asked_at.is_(None), A.owner == transaction.nonce)
    statement = sa.update(attempts).where(A.id == attempt.id, A.state == S.STARTED, is_free)
    return transaction.changed(statement.values(stop_asked_at=now, stop_asked_by=by, owner=transaction.nonce)) == 1


@transaction("write", started="yes")
def ended(
    transaction: Transaction,
    attempt: Attempt,
    kickoff_id: str,
    state: Ending,
    *,
    error: str | None = None,
    usage: Any = None,
    tokens: int | None = None,
    cost: float | None = None,
    result: Any = None,
) -> Attempt | None:
    """Write the end of a run, as the status of its last id reports it. Return the caller's attempt with the end if this
    call wrote it: then it emits the event."""
    now = transaction.lock(_key_lock(attempt.key))
    guards = {"id": attempt.id, "state": S.STARTED, "kickoff_id": kickoff_id}
    values = {"state": state, "ended_at": now, "error": error, "usage": usage, "tokens": tokens, "cost": cost}
    values["owner"] = transaction.nonce
    if not _change(transaction, guards, **values):
        current = _get(transaction, attempt.id)
        return current if current is not None and current.owner == transaction.nonce else None
    close(transaction, attempt, tokens, cost)
    if result is not None:
        transaction.connection.execute(_INSERT_RESULT, {"attempt_id": attempt.id, "body": result})
    return replace(attempt, kickoff_id=kickoff_id, **values)


_INSERT_RESULT = sa.insert(results)


@transaction("write")
def resolve(
    transaction: Transaction,
    attempt: Attempt,
    to: Literal[S.STARTED, S.NOT_STARTED, S.LOST],
    by: str,
    *,
    kickoff_id: str | None = None,
    timeout: float = 0.0,
) -> Started:
    """Write a person's word: that an uncertain attempt started a run with this id, or none; that a started run is lost;
    or, with STARTED, under which id a started run goes on.

    It counts from the attempt's deadline on. Return the attempt as it is now: another state than `to` says why not.
    """
    now = transaction.lock(_key_lock(attempt.key))
    current = _get(transaction, attempt.id)
    if current is None:
        return Started(attempt=None)
    may_resolve = current.state in (S.POSTING, S.UNCERTAIN) and current.is_free(now)
    if to is S.STARTED and kickoff_id is not None:
        if may_resolve or current.state is S.NOT_STARTED:
            return _start(transaction, current, kickoff_id, timeout, now, by)
        if current.state is S.STARTED:
            other_key = _claim_id(transaction, current, kickoff_id)
            return Started(attempt=_get(transaction, attempt.id), other_key=other_key)
    elif to is S.NOT_STARTED and may_resolve:
        _end_unsent(transaction, current, now, by)
    elif to is S.LOST and current.state is S.STARTED:
        _change(transaction, {"id": current.id, "state": S.STARTED}, state=S.LOST, ended_at=now, resolved_by=by)
        close(transaction, current, None, None)
    return Started(attempt=_get(transaction, attempt.id))


# Read


@transaction("read")
def time_now(transaction: Transaction) -> float:
    """Return the time by the clock of the database."""
    return transaction.now()


@transaction("read")
def get(transaction: Transaction, attempt_id: str) -> Attempt | None:
    """Return an attempt by its id."""
    return _get(transaction, attempt_id)


@transaction("read")
def of_key(transaction: Transaction, key: str) -> list[Attempt]:
    """Return the attempts of a key, the first one first."""
    return _read(transaction, _BY_KEY, key=key)


@transaction("read")
def of_kickoff_id(transaction: Transaction, kickoff_id: str) -> list[Attempt]:
    """Return the attempts with a kickoff id: of several crews, two may have the same."""
    holders = sa.select(kickoff_ids.c.attempt_id).where(kickoff_ids.c.kickoff_id == kickoff_id)
    return _read(transaction, _ATTEMPT.where(A.id.in_(holders)))


@transaction("read")
def ids_of(transaction: Transaction, attempt_id: str) -> list[str]:
    """Return all kickoff ids of a run, the first one first."""
    ids = kickoff_ids.c
    query = sa.select(ids.kickoff_id).where(ids.attempt_id == attempt_id).order_by(ids.number)
    return [*transaction.connection.scalars(query)]


@transaction("read")
def result_of(transaction: Transaction, attempt_id: str) -> Any:
    """Return the result of an attempt, None if none is stored."""
    return transaction.connection.scalar(sa.select(results.c.body).where(results.c.attempt_id == attempt_id))


@transaction("read")
def list_attempts(
    transaction: Transaction,
    *,
    states: Collection[AttemptState] | None = None,
    is_in_flight: bool = False,
    crew: str | None = None,
    session: str | None = None,
    batch: str | None = None,
    with_rows: bool = True,
    flow_run_ids: Collection[str] | None = None,
    before: tuple[float, str] | None = None,
    limit: int = 100,
) -> list[Attempt]:
    """Return attempts, the latest first. `crew`: its name or its URL. `with_rows`: whether also those of rows of
    batches. `before`: the `begun_at` and `id` of the last one of the page before."""
    where: list[sa.ColumnElement[bool]] = []
    if states is not None:
        where.append(A.state.in_([*states]))
    if is_in_flight:
        where.append(A.ended_at.is_(None))
    if flow_run_ids is not None:
        where.append(A.flow_run_id.in_([*flow_run_ids]))
    if before is not None:
        where.append(sa.tuple_(A.begun_at, A.id) < sa.tuple_(*map(sa.literal, before)))
    if crew is not None:
        where.append(sa.or_(A.crew == crew, A.crew_url == crew))
    if not with_rows:
        where.append(A.batch.is_(None))
    where += [column == value for column, value in ((A.session, session), (A.batch, batch)) if value is not None]
    return _read(transaction, _ATTEMPT.where(*where).order_by(A.begun_at.desc(), A.id.desc()).limit(limit))
