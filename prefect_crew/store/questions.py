"""Questions to people, their answers, and the right to send an answer: once, whatever happens in between."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import Attempt
from prefect_crew.store.news import tell
from prefect_crew.store.schema import attempts, questions

Q = questions.c


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question of a run. `number` counts those of its attempt from 1. With a `sender` and without `sent_at`, its
    answer may have been sent: once `send_deadline` is over, nobody knows, unless the run has moved on."""

    id: str
    attempt_id: str
    number: int
    task: str | None
    text: str | None
    asked_at: float
    answer: Any
    answered_by: str | None
    answered_at: float | None
    sender: str | None
    send_deadline: float | None
    sent_at: float | None


def _read(transaction: Transaction, *where: sa.ColumnElement[bool]) -> list[Question]:
    query = sa.select(questions).where(*where).order_by(Q.asked_at, Q.number)
    return [Question(**row) for row in transaction.connection.execute(query).mappings()]


def _set(transaction: Transaction, question_id: str, *where: sa.ColumnElement[bool], **values: Any) -> bool:
    return transaction.changed(sa.update(questions).where(Q.id == question_id, *where).values(values)) == 1


def _is_open() -> sa.ColumnElement[bool]:
    """The condition that the run has not ended, and has asked nothing later."""
    later = questions.alias()
    return sa.and_(
        sa.exists().where(attempts.c.id == Q.attempt_id, attempts.c.ended_at.is_(None)).correlate(questions),
        ~sa.exists().where(later.c.attempt_id == Q.attempt_id, later.c.number > Q.number).correlate(questions),
    )


@transaction("write")
def ask(transaction: Transaction, attempt: Attempt, number: int, *, task: str | None, text: str | None) -> Question:
    """Write a question, once for each number of a run; return it as it is now."""
    now = transaction.lock(f"key:{attempt.key}")
    values = {"id": secrets.token_urlsafe(24), "attempt_id": attempt.id, "number": number, "task": task, "text": text}
    if transaction.insert_once(questions, **values, asked_at=now):
        tell(transaction, now, attempt.id, "question", number=number)
    return _read(transaction, Q.attempt_id == attempt.id, Q.number == number)[0]


@transaction("write")
def answer(transaction: Transaction, question_id: str, answer: Any, by: str) -> bool:
    """Write the answer to a question that is open and has none."""
    now = transaction.lock()
    if not _set(
        transaction, question_id, Q.answer.is_(None), _is_open(), answer=answer, answered_by=by, answered_at=now
    ):
        return False
    attempt_id, number = transaction.connection.execute(
        sa.select(Q.attempt_id, Q.number).where(Q.id == question_id)
    ).one()
    tell(transaction, now, attempt_id, "answer", number=number)
    return True


@transaction("write")
def send(transaction: Transaction, question_id: str, sender: str, seconds: float) -> bool:
    """Take the right to send the answer to an open question by `POST /resume`, which takes up to `seconds`."""
    now = transaction.lock()
    where = (Q.answer.is_not(None), Q.sender.is_(None), _is_open())
    return _set(transaction, question_id, *where, sender=sender, send_deadline=now + seconds)


@transaction("write")
def sent(transaction: Transaction, question_id: str) -> bool:
    """Write that an answer was sent: by the answer to `/resume`, or since the run has moved on."""
    now = transaction.lock()
    return _set(transaction, question_id, Q.sender.is_not(None), Q.sent_at.is_(None), sent_at=now)


@transaction("write")
def not_sent(transaction: Transaction, question_id: str, sender: str, *, keep_answer: bool) -> bool:
    """Say, as its sender, that an answer surely was not sent. Without it, a person may answer once more."""
    transaction.lock()
    values: dict[str, Any] = {"sender": None, "send_deadline": None}
    if not keep_answer:
        values |= {"answer": None, "answered_by": None, "answered_at": None}
    return _set(transaction, question_id, Q.sender == sender, Q.sent_at.is_(None), **values)


@transaction("read")
def get_question(transaction: Transaction, question_id: str) -> Question | None:
    """Return a question by its id."""
    return next(iter(_read(transaction, Q.id == question_id)), None)


@transaction("read")
def questions_of(transaction: Transaction, attempt_id: str) -> list[Question]:
    """Return the questions of a run, the first one first."""
    return _read(transaction, Q.attempt_id == attempt_id)


@transaction("read")
def open_questions(transaction: Transaction) -> list[Question]:
    """Return the questions that wait for a person, the oldest first."""
    return _read(transaction, Q.answer.is_(None), _is_open())
