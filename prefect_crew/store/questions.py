"""Questions to people, their answers, and the right to send an answer: once, whatever happens in between."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from prefect_crew.store.attempts import get
from prefect_crew.store.database import Transaction, transaction
from prefect_crew.store.decision import Attempt
from prefect_crew.store.news import tell
from prefect_crew.store.schema import attempts, questions

Q = questions.c
FLOW = "flow"
"""The mark of a Flow's question, whose answer goes to a URL of its own."""
Marks = Mapping[str, str]
"""Digests of what the status or a webhook tells of a question, by the name of the fact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question of a run. `number` counts those of its attempt from 1. With a `sender` and without `sent_at`, its
    answer may have been sent: once `send_deadline` is over, nobody knows, unless the run has moved on."""

    id: str
    attempt_id: str
    number: int
    task: str | None
    text: str | None = field(repr=False)
    message: str | None = field(repr=False)
    options: Sequence[str] | None
    marks: Marks
    asked_at: float
    expires_at: float | None
    answer: Any = field(repr=False)
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


def _is_last() -> sa.ColumnElement[bool]:
    later = questions.alias()
    return ~sa.exists().where(later.c.attempt_id == Q.attempt_id, later.c.number > Q.number).correlate(questions)


def _is_open() -> sa.ColumnElement[bool]:
    """The condition that the run has not ended, and has asked nothing later."""
    is_in_flight = sa.exists().where(attempts.c.id == Q.attempt_id, attempts.c.ended_at.is_(None)).correlate(questions)
    return sa.and_(is_in_flight, _is_last())


# Ask


def is_same(marks: Marks, other: Marks) -> bool:
    """Return whether marks may be of one question: none of them differs."""
    return all(other.get(name, mark) == mark for name, mark in marks.items())


def new_facts(question: Question, before: Question | None, marks: Marks, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not known of a question yet; a Flow's webhook knows it better than a status. Marks of the question
    `before` are of a status that is late."""
    if before is not None and marks and marks.items() <= before.marks.items():
        return {}
    is_new = {name: FLOW in marks or getattr(question, name) is None for name in facts}
    new = {name: fact for name, fact in facts.items() if fact is not None and is_new[name]}
    return new if marks.items() <= question.marks.items() else {**new, "marks": {**question.marks, **marks}}


@transaction("write")
def ask(transaction: Transaction, attempt: Attempt, number: int, *, marks: Marks, **facts: Any) -> Question:
    """Write a question of a run, or what is new about it, and return it as it is now.

    It is the first one from `number` on whose marks may be of the same question, else the next one. `facts`: task,
    text, message, options.
    """
    now, before = transaction.lock(f"key:{attempt.key}"), None
    asked = _read(transaction, Q.attempt_id == attempt.id)
    for question in asked:
        is_of_flow = FLOW in marks and FLOW not in question.marks
        is_it = question.number >= number and is_same(question.marks, marks)
        if is_it and not (is_of_flow and question.sent_at is not None):
            if new := new_facts(question, before, marks, facts):
                _set(transaction, question.id, **new)
                tell(transaction, now, attempt.id, "question", number=question.number)
            return _read(transaction, Q.id == question.id)[0]
        before = question
    number = max(number, before.number + 1) if before is not None else number
    _arrived(transaction, now, attempt.id, number - 1)
    values = {"id": secrets.token_hex(24), "attempt_id": attempt.id, "number": number, "marks": dict(marks)}
    transaction.insert_once(questions, **values, **facts, asked_at=now)
    a = attempts.c
    waits = sa.update(attempts).where(a.id == attempt.id, a.ended_at.is_(None), a.human_since.is_(None))
    transaction.changed(waits.values(human_since=now))
    tell(transaction, now, attempt.id, "question", number=number)
    return _read(transaction, Q.attempt_id == attempt.id, Q.number == number)[0]


def _arrived(transaction: Transaction, now: float, attempt_id: str, number: int) -> None:
    """Write that the answers up to a number were sent: the run has moved on."""
    where = (Q.attempt_id == attempt_id, Q.number <= number, Q.sender.is_not(None), Q.sent_at.is_(None))
    transaction.changed(sa.update(questions).where(*where).values(sent_at=now))


@transaction("write")
def take_webhook(
    transaction: Transaction,
    attempt: Attempt,
    kind: str,
    *,
    number: int,
    kickoff_id: str | None,
    body: Any,
    question: Mapping[str, Any] | None,
) -> None:
    """Write what a webhook brought, whose URL was made for the answer to question `number`: news, and a question."""
    now = transaction.lock(f"key:{attempt.key}")
    tell(transaction, now, attempt.id, kind, number=number, kickoff_id=kickoff_id, body=body)
    _arrived(transaction, now, attempt.id, number)
    if question is not None:
        ask(transaction, attempt, number + 1, **question)


@transaction("write")
def open_link(transaction: Transaction, question_id: str, seconds: float) -> float | None:
    """Let a link answer a question for some seconds. Return until when; None if somebody has made the link before."""
    until = transaction.lock() + seconds
    return until if _set(transaction, question_id, Q.expires_at.is_(None), expires_at=until) else None


# Answer


@transaction("write")
def answer(
    transaction: Transaction, question_id: str, answer: Any, by: str, sender: str | None = None, seconds: float = 0.0
) -> bool:
    """Write the answer to a question that is open and has none. With a sender, it takes the right to send it, too."""
    now = transaction.lock()
    values = {"answer": answer, "answered_by": by, "answered_at": now}
    if sender is not None:
        values |= {"sender": sender, "send_deadline": now + seconds}
    # An equal answer may be this call's own. `send` decides who sends it.
    is_own = sa.and_(Q.answer == answer, Q.answered_by == by, Q.sender.is_not_distinct_from(sender))
    if not _set(transaction, question_id, sa.or_(Q.answer.is_(None), is_own), _is_open(), **values):
        return False
    (question,) = _read(transaction, Q.id == question_id)
    tell(transaction, now, question.attempt_id, "answer", number=question.number)
    return True


@transaction("write")
def send(transaction: Transaction, question_id: str, sender: str, seconds: float) -> bool:
    """Take the right to send the answer to an open question by `POST /resume`, which takes up to `seconds`. `sender`:
    a nonce of the call."""
    now = transaction.lock()
    where = (Q.answer.is_not(None), sa.or_(Q.sender.is_(None), Q.sender == sender), _is_open())
    return _set(transaction, question_id, *where, sender=sender, send_deadline=now + seconds)


@transaction("write")
def sent(transaction: Transaction, question_id: str) -> bool:
    """Write that an answer was sent: by the answer to `/resume`, or since the run has moved on."""
    now = transaction.lock()
    return _set(transaction, question_id, Q.sender.is_not(None), Q.sent_at.is_(None), sent_at=now)


@transaction("write")
def moved_on(transaction: Transaction, question_id: str) -> None:
    """Write that the run goes on after the answer to its last question, so that a wait for a person is a new one."""
    now, a = transaction.lock(), attempts.c
    is_its = a.id == sa.select(Q.attempt_id).where(Q.id == question_id, _is_last()).scalar_subquery()
    values = {"human_since": None, "human_seconds": a.human_seconds + now - a.human_since}
    transaction.changed(sa.update(attempts).where(is_its, a.human_since.is_not(None)).values(values))


@transaction("write")
def not_sent(transaction: Transaction, question_id: str, sender: str) -> bool:
    """Say, as its sender, that an answer surely was not sent. A person may answer once more."""
    transaction.lock()
    values = dict.fromkeys(("sender", "send_deadline", "answer", "answered_by", "answered_at"))
    return _set(transaction, question_id, Q.sender == sender, Q.sent_at.is_(None), **values)


@transaction("write")
def uncertain(transaction: Transaction, question_id: str, sender: str) -> bool:
    """Say, as its sender, that nobody knows whether an answer arrived, and that its POST is over."""
    now = transaction.lock()
    return _set(transaction, question_id, Q.sender == sender, Q.sent_at.is_(None), send_deadline=now)


# Read


@transaction("read")
def look(transaction: Transaction, attempt_id: str) -> tuple[float, Attempt | None, list[Question]]:
    """Return the time, an attempt and its questions, the first one first."""
    return transaction.now(), get(transaction, attempt_id), _read(transaction, Q.attempt_id == attempt_id)


@transaction("read")
def get_question(transaction: Transaction, question_id: str) -> tuple[float, Question | None]:
    """Return the time, and a question by its id."""
    return transaction.now(), next(iter(_read(transaction, Q.id == question_id)), None)


@transaction("read")
def questions_of(transaction: Transaction, attempt_id: str) -> list[Question]:
    """Return the questions of a run, the first one first."""
    return _read(transaction, Q.attempt_id == attempt_id)


@transaction("read")
def open_questions(transaction: Transaction) -> list[Question]:
    """Return the questions that wait for a person, the oldest first."""
    return _read(transaction, Q.answer.is_(None), _is_open())
