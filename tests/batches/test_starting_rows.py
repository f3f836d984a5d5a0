"""A row is started at most once, and what surely did not start is free again, whatever befalls its caller or ledger."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from prefect_crew.batches.ledger import Ledger
from prefect_crew.crew import CrewSession
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import LedgerError
from prefect_crew.records.keys import RunIdentity
from prefect_crew.records.model import Caller, Lease, RecordPhase
from prefect_crew.runs import kickoff
from prefect_crew.runs.kickoff import Start, Started, start_run
from prefect_crew.settings import CrewSettings
from prefect_crew.testing import CrewServerFactory
from support.batches import record_of

CLAIMED, NOT_STARTED, STARTED = RecordPhase.CLAIMED, RecordPhase.NOT_STARTED, RecordPhase.STARTED


async def start(ledger: Ledger, server: CrewServer, session: CrewSession | None = None) -> Started:
    """Start the row "k", as a batch does."""
    if session is None:
        async with CrewSession(server.crew().crew) as session:
            return await start(ledger, server, session)
    identity = RunIdentity(ledger.idempotency_key("k"), "place", Caller(owner=f"caller {id(session)}"))
    known: dict[str, Any] = {"quiet": True, "settings": CrewSettings()}
    return await start_run(
        Start(session.crew, identity, {"text": "a"}, "digest", None, None, None, **known), ledger, session
    )


async def phases(ledger: Ledger) -> list[RecordPhase]:
    return [one.phase for one in await ledger.attempts(ledger.idempotency_key("k"))]


async def test_a_row_is_not_sent_once_its_claim_is_over(
    crew_server: CrewServerFactory, ledger_address: str, monkeypatch: pytest.MonkeyPatch
):
    # The ledger tells others by the age of the claim alone when it may be resolved.
    claims: list[Lease] = []

    def lease(seconds: float) -> Lease:
        claims.append(Lease(seconds))
        return claims[-1]

    def sleeping(*_: Any, **__: Any) -> None:
        if len(claims) == 1:
            claims[0].end()

    monkeypatch.setattr(kickoff, "Lease", lease)
    monkeypatch.setattr(kickoff, "webhooks_for", sleeping)
    server = crew_server("echo")
    async with Ledger(ledger_address, "b") as ledger:
        bought = await start(ledger, server)
        assert bought.record.attempt == 2
        assert await phases(ledger) == [NOT_STARTED, STARTED]
    assert server.requests["kickoff"] == 1


async def test_a_row_whose_caller_is_cancelled_over_its_claim_did_not_start(
    crew_server: CrewServerFactory, ledger_address: str, monkeypatch: pytest.MonkeyPatch
):
    server = crew_server("echo")
    async with Ledger(ledger_address, "b") as ledger:
        run, committing, go_on = ledger.database.run, asyncio.Event(), asyncio.Event()

        async def slowly(work: Any) -> Any:
            committing.set()
            await go_on.wait()
            return await run(work)

        monkeypatch.setattr(ledger.database, "run", slowly)
        starting = asyncio.ensure_future(start(ledger, server))
        await committing.wait()
        starting.cancel()
        await asyncio.wait({starting}, timeout=0.1)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert await phases(ledger) == [NOT_STARTED]
        await start(ledger, server)
        assert await phases(ledger) == [NOT_STARTED, STARTED]
    assert server.requests["kickoff"] == 1


async def test_an_id_that_a_ledger_does_not_take_any_more_is_in_the_log(
    crew_server: CrewServerFactory,
    ledger_address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    server = crew_server("echo")
    async with Ledger(ledger_address, "b") as ledger:
        run = ledger.database.run

        async def away_once_started(work: Any) -> Any:
            if server.runs:
                raise OperationalError("", {}, Exception("disk I/O error"))
            return await run(work)

        monkeypatch.setattr(ledger.database, "run", away_once_started)
        ledger.writer.patience = 0.1
        with caplog.at_level(logging.ERROR, "prefect_crew"), pytest.raises(LedgerError, match="disk I/O error"):
            await start(ledger, server)
        monkeypatch.undo()
        assert await phases(ledger) == [CLAIMED]
    assert f"prefect-crew batch resolve b k --kickoff-id {server.runs[0].id}" in caplog.text


async def test_a_kickoff_that_is_refused_after_its_caller_has_gone_did_not_start(
    crew_server: CrewServerFactory, ledger_address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff, "FINISH", 0.05)
    server = crew_server("echo", faults=["kickoff:latency=1.0@1", "kickoff:404@1"])
    async with Ledger(ledger_address, "b") as ledger, CrewSession(server.crew().crew) as session:
        starting = asyncio.ensure_future(start(ledger, server, session))
        while not server.requests["kickoff"]:
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert await phases(ledger) == [CLAIMED]
        while await phases(ledger) == [CLAIMED]:
            await asyncio.sleep(0.05)
        assert await phases(ledger) == [NOT_STARTED]


async def test_a_ledger_that_is_closed_says_so(ledger_address: str):
    # Whoever writes to it then would wait for ever: for a commit that nobody makes.
    async with Ledger(ledger_address, "b") as ledger:
        pass
    with pytest.raises(LedgerError, match="is closed"):
        await asyncio.wait_for(ledger.claim(record_of(ledger, "k")), 10)
