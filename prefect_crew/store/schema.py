"""The tables of the crew database. Times are seconds since 1970 by the clock of the database (`database.py`)."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from prefect_crew.store.decision import AttemptState

VERSION = 2
"""Of these tables. A store of another version is refused."""


def plain_text(text: str) -> str:
    """Return a text without NUL and half surrogates, which PostgreSQL refuses."""
    return text.replace("\0", "").encode("utf-8", "ignore").decode()


class Text(sa.TypeDecorator[str]):
    """A text that both databases take."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Return the text as it is stored."""
        return None if value is None else plain_text(value)


class State(sa.TypeDecorator[AttemptState]):
    """The state of an attempt."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: AttemptState | None, dialect: Any) -> str | None:
        """Return the plain word."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Any) -> AttemptState | None:
        """Return the state of a stored word."""
        return None if value is None else AttemptState(value)


class Json(sa.TypeDecorator[Any]):
    """A JSON value, stored as ASCII text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """Return the text that is stored; NULL for None."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        """Return the value of a stored text."""
        return None if value is None else json.loads(value)


class Money(sa.TypeDecorator[float]):
    """An amount of money, stored in millionths: sums of them are exact, in whatever order they are made."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Any) -> int | None:
        """Return the millionths."""
        return None if value is None else round(value * 1_000_000)

    def process_result_value(self, value: Any, dialect: Any) -> float | None:
        """Return the amount. PostgreSQL gives a sum as Decimal."""
        return None if value is None else int(value) / 1_000_000


def _table(name: str, *parts: Any) -> sa.Table:
    return sa.Table(f"crew_{name}", METADATA, *parts)


def _text(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, Text, **options)


def _number(name: str, kind: Any = sa.Integer, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **options)


def _time(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, **options)


def _index(name: str, *columns: str, where: str | None = None) -> sa.Index:
    condition = None if where is None else sa.text(where)
    return sa.Index(f"crew_{name}", *columns, sqlite_where=condition, postgresql_where=condition)


def _attempt(**options: Any) -> sa.Column[Any]:
    return sa.Column("attempt_id", sa.ForeignKey("crew_attempts.id", ondelete="CASCADE"), **options)


METADATA = sa.MetaData()

store = _table("store", _text("id", primary_key=True), _number("version"), _time("created_at", nullable=False))
"""One row: the name of this database."""

attempts = _table(
    "attempts",
    _text("id", primary_key=True),
    _text("key", nullable=False),
    _number("number"),
    sa.Column("state", State, nullable=False),
    _number("replaced", sa.Boolean),
    # The crew and what it was asked.
    _text("crew", nullable=False),
    _text("crew_url", nullable=False),
    _text("inputs_digest", nullable=False),
    sa.Column("input_digests", Json),
    sa.Column("secret_names", Json),
    _number("has_webhooks", sa.Boolean),
    _text("crew_version"),
    # The call that owns it.
    _text("owner", nullable=False),
    _text("flow_run_id"),
    _number("flow_run_count"),
    _text("process"),
    # Its times.
    _time("begun_at", nullable=False),
    _time("deadline"),
    _time("started_at"),
    _time("ended_at"),
    _time("counts_until", nullable=False),
    _time("human_since"),
    _number("human_seconds", sa.Double),
    _time("stop_asked_at"),
    _text("stop_asked_by"),
    _text("resolved_by"),
    # Its end and its use.
    _text("error"),
    sa.Column("usage", Json),
    sa.Column("tokens", sa.BigInteger),
    sa.Column("cost", Money),
    sa.Column("estimates", Json),
    # The session or the batch that it belongs to.
    _text("session"),
    sa.Column("turn", sa.Integer),
    _text("restored"),
    _text("step"),
    _text("batch"),
    _text("row_key"),
    sa.UniqueConstraint("key", "number"),
    sa.UniqueConstraint("crew_url", "session", "turn"),  # NULLs do not collide
    _index("attempts_in_flight", "crew_url", "counts_until", where="ended_at IS NULL"),
    _index("attempts_backing_off", "deadline", where="state = 'backing_off'"),
    _index("attempts_begun", "begun_at"),
    _index("attempts_costs", "ended_at", "crew", "crew_url", "batch", "state", "tokens", "cost", "flow_run_id"),
    _index("attempts_flow_run", "flow_run_id", where="flow_run_id IS NOT NULL"),
)
"""A row for each try to start a run, of a batch's row as well. `replaced`: the key has a later attempt. `deadline`:
until then nobody else may touch an attempt without a kickoff id. `counts_until`: it holds a slot of the limit."""
is_current = sa.not_(attempts.c.replaced)
_is_of_batch = attempts.c.batch.is_not(None)
sa.Index(
    "crew_attempts_batch",
    *(attempts.c[name] for name in ("batch", "replaced", "state", "tokens", "cost")),
    sqlite_where=_is_of_batch,
    postgresql_where=_is_of_batch,
)

kickoff_ids = _table(
    "kickoff_ids",
    _text("crew_url", primary_key=True),
    _text("kickoff_id", primary_key=True),
    _attempt(nullable=False),
    _number("number"),
    sa.UniqueConstraint("attempt_id", "number"),
)
"""The ids of a run: each belongs to one attempt. `/resume` adds a second one; the last one is polled."""

results = _table("results", _attempt(primary_key=True), sa.Column("body", Json, nullable=False))
"""The results, up to 5 MB each, apart from the attempts: these stay narrow."""

questions = _table(
    "questions",
    _text("id", primary_key=True),
    _attempt(nullable=False),
    _number("number"),
    _text("task"),
    _text("text"),
    _text("message"),
    sa.Column("options", Json),
    sa.Column("marks", Json, nullable=False),
    _time("asked_at", nullable=False),
    _time("expires_at"),
    sa.Column("answer", Json),
    _text("answered_by"),
    _time("answered_at"),
    _text("sender"),
    _time("send_deadline"),
    _time("sent_at"),
    sa.UniqueConstraint("attempt_id", "number"),
)
"""Questions to people. The id is random: the link that answers carries it, until `expires_at`. `message` and `options`:
of a Flow. `marks`: the digests that tell a question from the others of its run."""

batches = _table(
    "batches",
    _text("name", primary_key=True),
    _text("crew_url", nullable=False),
    sa.Column("call", Json),
    _number("total"),
    sa.Column("bad_rows", Json),
    _text("owner"),
    _time("owner_seen", nullable=False),
    _text("flow_run_id"),
    _text("process"),
    _number("passes"),
    _text("stopped_because"),
    _time("cancelled_at"),
    sa.Column("exported", Json),
    _number("is_going", sa.Boolean),
)
"""The batches. `is_going`: it is being deleted, in pieces."""

rows = _table(
    "rows",
    sa.Column("batch", sa.ForeignKey("crew_batches.name"), primary_key=True),
    _text("row_key", primary_key=True),
    _number("position"),
    _number("passes"),
    sa.Column("inputs", Json, nullable=False),
    _text("inputs_digest", nullable=False),
    _text("attempt_id"),
    _index("rows_position", "batch", "position", "row_key"),
)
"""The rows of data sets. `passes`: of its batch, the last one whose data set had the row. Its state is that of its
attempt. `inputs` are those of a completed run, also where the data set has others since (`inputs_digest`)."""

news = _table(
    "news",
    sa.Column("n", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    _text("topic", nullable=False),
    _time("received_at", nullable=False),
    _text("kind", nullable=False),
    sa.Column("number", sa.Integer),
    _text("kickoff_id"),
    sa.Column("body", Json),
    _index("news_received", "received_at"),
)
"""The events that end the pause of a wait. `topic`: the id of an attempt or the name of a batch. `number`: of the
question whose answer the webhook's URL came after."""

spending = _table(
    "spending",
    _text("scope", primary_key=True),
    _text("day", primary_key=True),
    _number("runs"),
    _number("tokens", sa.BigInteger),
    _number("cost", Money),
    _number("open_runs"),
    _number("open_tokens", sa.BigInteger),
    _number("open_cost", Money),
)
"""The use of the runs that began on a day (UTC), by scope of a budget; `open_`: the estimates of those in flight."""

workers = _table(
    "workers",
    _text("boot", primary_key=True),
    _text("pool", nullable=False),
    _text("name", nullable=False),
    _text("host", nullable=False),
    _time("begun_at", nullable=False),
    _time("seen_since", nullable=False),
    _time("dead_at", nullable=False),
)
"""The crew workers: a row for each start of one. `pool`: the id of its work pool. `dead_at`: each heartbeat postpones
it; from then on others may take over its flow runs. `seen_since`: the first heartbeat that none was missed after."""

held = _table(
    "held", _text("flow_run_id", primary_key=True), _text("boot", nullable=False), _index("held_boot", "boot")
)
"""The flow runs that a worker holds, written before the flow run is Pending."""
