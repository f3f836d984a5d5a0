"""The promises hold in the worlds of `permit_worlds.py` and `withdraw_worlds.py`, without excuses, and a mistake about
claims and kickoff ids is seen there."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.records import store
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import kickoff
from proof import permit_worlds, withdraw_worlds
from proof.sim import world as world_module
from proof.sim.oracle import broken_promises
from proof.sim.world import World

WORLDS = permit_worlds.WORLDS | withdraw_worlds.WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_the_promises_hold_without_excuses_when(name: str) -> None:
    world = World(WORLDS[name]).play()
    assert not (broken := broken_promises(world, strict=True)), "\n".join([*broken, *world.trace])


@pytest.mark.parametrize("worlds", [permit_worlds.WORLDS, withdraw_worlds.WORLDS], ids=["permits", "withdrawals"])
def test_the_page_says_how_many_worlds_there_are(worlds: dict[str, Any]) -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "at-most-once.md"
    assert f"| {len(worlds)} simulated worlds " in page.read_text("utf-8")


async def _withdraw_always(
    record: RunRecord, records: PrefectRecords, error: BaseException, unused: Any = None
) -> None:
    if isinstance(error, kickoff.ClaimLostError) and unused is not None:
        return await _give_back(record, records, error, unused)
    record.phase, record.reason = RecordPhase.NOT_STARTED, type(error).__name__
    await records.withdraw(record)
    await kickoff.release(record)
    return None


_give_back = kickoff._give_back


async def _withdraw_by_name(self: PrefectRecords, record: RunRecord) -> None:
    path = f"/variables/name/{store.record_name(record.idempotency_key, record.attempt)}"
    async with store.get_client() as client:
        try:
            await store.request_soon(client, "DELETE", path, json=None, give_up_after=0.0)
        except PREFECT_ERRORS:
            await self.save(record)


async def _name_first(self: PrefectRecords, record: RunRecord) -> str | None:
    other = await self._name_kickoff(record)
    await self.save(record)
    return other


async def _keep_id(self: PrefectRecords, record: RunRecord) -> None:
    await _name_kickoff(self, record)


_name_kickoff = PrefectRecords._name_kickoff


async def _look_at_no_name(self: PrefectRecords, record: RunRecord) -> None:
    return None


ONE_ID = "two kickoffs of two keys are answered with one id"
MISTAKES: dict[str, tuple[Any, str, Any, str]] = {
    "a claim that is deleted although a permit was taken": (
        *(kickoff, "_give_back", _withdraw_always),
        "a claim is renewed for a 429 and that write lands when the run has ended",
    ),
    "a claim that is deleted by its name": (
        *(PrefectRecords, "withdraw", _withdraw_by_name),
        "a start is refused again and again, and the deletion of its first claim is twice",
    ),
    "an id that is named before it is written": (
        *(PrefectRecords, "save_started", _name_first),
        f"{ONE_ID}, and one of the callers sleeps, before its step 9",
    ),
    "an id that two records keep": (
        *(PrefectRecords, "_name_kickoff", _keep_id),
        f"{ONE_ID} at the same moment, before its step 1",
    ),
    "an id of a run that was found, of which nobody looks whose it is": (
        *(PrefectRecords, "other_holder", _look_at_no_name),
        f"{ONE_ID}, and one of the callers dies, before its step 3",
    ),
}
"""Each with what stands in the place of what, and the world in which it is seen."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_claims_and_ids_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement, world = MISTAKES[mistake]
    monkeypatch.setattr(world_module, "HANGS_AFTER", 100.0)
    with mock.patch.object(owner, name, replacement, create=True):
        assert broken_promises(World(WORLDS[world]).play(), strict=True)
