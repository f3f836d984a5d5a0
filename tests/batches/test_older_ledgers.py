"""An older copy of a ledger, such as a backup, is noticed: the rows that were started since are not in it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from prefect_crew.batches import ownership
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.ownership import binding_name, check_age, read_binding
from prefect_crew.batches.stored import open_stored_batch
from prefect_crew.exceptions import LedgerError
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches
from support.scripts import script

ECHO = script({"output": "on {{ topic }}"}, inputs=["topic"])


def topics(count: int) -> list[dict[str, str]]:
    return [{"topic": f"topic {number}"} for number in range(count)]


def copied(source: Path, target: Path) -> Path:
    """Copy a ledger as a snapshot does, also while it is in use."""
    with sqlite3.connect(source) as before, sqlite3.connect(target) as after:
        before.backup(after)
    before.close()
    after.close()
    return target


async def generation(name: str) -> int:
    bound = await read_binding(name)
    assert bound is not None
    return int(bound["generation"])


async def test_a_backup_from_before_the_last_call_is_refused_and_the_newer_one_goes_on(
    batch: Batches, crew_server: CrewServerFactory, tmp_path: Path
):
    server, name, ledger = crew_server(ECHO), "restored", tmp_path / "out.jsonl.ledger.db"
    await batch(server.crew(), topics(6), name=name, max_kickoffs=2)
    backup = copied(ledger, tmp_path / "backup.db")
    assert (await batch(server.crew(), topics(6), name=name)).completed == 6
    newer = ledger.rename(tmp_path / "newer.db")
    shutil.copy(backup, ledger)
    with pytest.raises(LedgerError, match=r"out\.jsonl\.ledger\.db is an older copy: .*nothing was started") as refused:
        await batch(server.crew(), topics(6), name=name)
    assert f"prefect variable unset {binding_name(name)}" in str(refused.value)
    with pytest.raises(LedgerError, match="is an older copy"):
        async with open_stored_batch(name):
            pass
    assert server.kickoffs == 6
    # It may be anywhere; and the copy is the older one from then on.
    report = await batch(server.crew(), topics(7), name=name, ledger=str(newer), on_change="continue")
    assert (report.completed, server.kickoffs) == (7, 7)
    # A person who has read the warning takes the older one.
    async with get_client() as client:
        await client.delete_variable_by_name(binding_name(name))
    report = await batch(server.crew(), topics(6), name=name)
    assert (report.completed, server.kickoffs) == (6, 11)


async def test_a_copy_from_the_middle_of_a_call_is_refused(
    batch: Batches, crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where its machine dies then: the generation grows while rows are started, and not at the end alone."""
    monkeypatch.setattr("prefect_crew.batches.run.BEGIN_EVERY", 0.0)
    server = crew_server(script({"output": "on {{ topic }}", "seconds": 0.3}, inputs=["topic"]))
    ledger, name = tmp_path / "out.jsonl.ledger.db", "copied"
    running = asyncio.ensure_future(batch(server.crew(), topics(400), name=name, max_in_flight=2))
    while server.kickoffs < 2:
        await asyncio.sleep(0.02)
    copy = copied(ledger, tmp_path / "copy.db")
    at = await generation(name)
    while await generation(name) == at:
        assert not running.done()
        await asyncio.sleep(0.05)
    async with Ledger(str(copy), name) as opened:
        entry = await opened.entry()
    assert entry is not None
    with pytest.raises(LedgerError, match="is an older copy"):
        check_age(entry, await generation(name), ledger="copy.db")
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


class Killed(BaseException):
    """What is as sudden as SIGKILL."""


@pytest.mark.parametrize("point", ["before the ledger", "between ledger and server", "before the first row"])
async def test_a_call_that_dies_over_its_generation_locks_nobody_out(
    batch: Batches, crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
):
    server, name, ledger = crew_server(ECHO), f"dies {point}", tmp_path / "out.jsonl.ledger.db"
    await batch(server.crew(), topics(6), name=name, max_kickoffs=2)
    backup = copied(ledger, tmp_path / "backup.db")

    def dying(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        async def dies(*args: Any, **kwargs: Any) -> None:
            if after:
                await function(*args, **kwargs)
            raise Killed

        return dies

    with monkeypatch.context() as patch:
        if point == "before the first row":
            patch.setattr("prefect_crew.batches.run.begin_generation", dying(ownership.begin_generation, after=True))
        else:
            patch.setattr(Ledger, "advance", dying(Ledger.advance, after=point == "between ledger and server"))
        with pytest.raises(Killed):
            await batch(server.crew(), topics(6), name=name)
    assert server.kickoffs == 2
    async with Ledger(str(backup), name) as opened:
        entry = await opened.entry()
    assert entry is not None
    if point == "before the first row":
        with pytest.raises(LedgerError, match="is an older copy"):
            check_age(entry, await generation(name), ledger="backup.db")
    else:
        check_age(entry, await generation(name), ledger="backup.db")
    for _ in range(2):
        report = await batch(server.crew(), topics(6), name=name)
        assert (report.completed, server.kickoffs) == (6, 6)


async def test_a_call_that_has_nothing_to_start_leaves_the_generation(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ECHO)
    await batch(server.crew(), topics(2), name="done already")
    before = await generation("done already")
    await batch(server.crew(), topics(2), name="done already")
    assert await generation("done already") == before
