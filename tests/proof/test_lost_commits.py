"""The database has committed, and its answer is lost with the connection: whoever wrote that knows it and acts once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

import prefect_crew as pc
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import URL_SETTING, find_store
from prefect_crew.runs.database import forget_stores as close_stores
from prefect_crew.store import database
from support.postgres import Postgres
from support.scripts import ASKS, slow
from support.seen import Seen
from support.waiting import LIMIT, until

pytestmark = [pytest.mark.postgres, pytest.mark.usefixtures("prefect_api", "instant_polling")]


@pytest.fixture(scope="module")
def database_url(postgres: Postgres) -> str:
    return postgres.create_database("lost_commits").replace("+asyncpg", "")


@pytest.fixture(autouse=True)
def on_postgres(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The crew database of this process is in PostgreSQL. Only what goes wrong on a connection of before is repeated,
    so there is one for each kind of transaction."""
    monkeypatch.setattr(database, "THREADS", 1)
    monkeypatch.setattr(database, "IDLE", LIMIT)
    monkeypatch.setenv(URL_SETTING, database_url)
    yield
    close_stores()


@contextmanager
def losing_answers() -> Iterator[list[str]]:
    """Lose the answer to the first commit of each transaction that writes one of the columns of a right."""
    engine, lost = find_store()._engine, list[str]()

    @contextmanager
    def listening(name: str, listener: Callable[..., None]) -> Iterator[None]:
        event.listen(engine, name, listener)
        yield
        event.remove(engine, name, listener)

    def see(connection: sa.Connection, _: Any, statement: str, *__: Any) -> None:
        columns = [column for column in RIGHTS if f"{column}=%" in statement and column not in lost]
        connection.info.setdefault("columns", []).extend(columns)

    def commit(connection: sa.Connection) -> None:
        if columns := connection.info.pop("columns", None):
            lost.extend(columns)
            driver: Any = connection.connection.driver_connection
            driver.commit()
            driver.close()

    with listening("before_cursor_execute", see), listening("commit", commit):
        yield lost


RIGHTS = ["stop_asked_at", "usage", "answer", "send_deadline"]
"""A column that is written with each right that is taken once: to stop, to tell of the end, to answer, to send that."""


async def test_a_stop_is_sent_once():
    with CrewServer(slow(600)) as server:
        run = await server.crew().atrigger({})
        policy = pc.WaitPolicy(timeout=0.1, on_timeout="stop")
        with losing_answers() as lost, pytest.raises(pc.CrewTimeoutError, match="stopped"):
            await run.await_for_completion(policy)
        assert (lost, server.requests["stop"]) == (["stop_asked_at", "usage"], 1)


async def test_an_end_is_told_once(seen: Seen):
    with CrewServer(slow(0.1)) as server:
        run = await server.crew().atrigger({})
        with losing_answers() as lost:
            await run.await_for_completion()
        events = [one["event"] for one in await asyncio.to_thread(seen.events, str(run.kickoff_id))]
        assert (lost, events.count("crew.completed")) == (["usage"], 1)


@pytest.mark.parametrize("show", ["full", "summary"], ids=["stored", "not stored"])
async def test_an_answer_is_sent_once(show: Any):
    with CrewServer(ASKS) as server:
        run = await server.crew(show=show).atrigger({})
        await until(lambda: server.runs[0].state == "waiting")
        with losing_answers() as lost:
            await run.aresume("Good.", approve=True)
        assert (lost, server.requests["resume"]) == (["answer", "send_deadline"], 1)
