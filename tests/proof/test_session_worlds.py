"""The turns of a session come one after the other, whatever happens to their callers, and each starts from the last
completed one; a mistake about turns is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from prefect_crew.client.models import CrewResult
from prefect_crew.records import prune, sessions
from prefect_crew.records.model import RunRecord
from prefect_crew.runs import kickoff
from proof.sim.oracle import broken_promises
from proof.sim.scenario import Call, CrewRun, Prune, Scenario
from proof.sim.world import World, key_of

THREE = (Call(), Call(at=0.1, key=1), Call(at=0.2, key=2))
SLOW = (CrewRun(seconds=3.0), CrewRun(seconds=3.0), CrewRun(seconds=3.0))
AGAIN = (1.0, 3.0, 15.0, 50.0, 50.0)
WORLDS = {
    "three call at the same time": Scenario(calls=(Call(), Call(key=1), Call(key=2)), runs=SLOW),
    "three call one after the other": Scenario(calls=(Call(), Call(at=9.0, key=1), Call(at=20.0, key=2)), runs=SLOW),
    "a turn fails and is left out": Scenario(
        calls=(Call(), Call(at=9.0, key=1, again=(9.0,)), Call(at=30.0, key=2)),
        runs=(CrewRun(), CrewRun("fails"), CrewRun()),
        max_attempts=1,
    ),
    "a failed turn is called again after another turn": Scenario(
        calls=(Call(again=(20.0,)), Call(at=5.0, key=1)), runs=(CrewRun("fails"), CrewRun(seconds=3.0))
    ),
    "a turn is called again by its key": Scenario(calls=(*THREE, Call(at=30.0), Call(at=31.0, key=1)), runs=SLOW),
    "two callers share a key": Scenario(calls=(Call(), Call(at=0.1), Call(at=0.2, key=1)), runs=SLOW),
    "a turn is forced": Scenario(calls=(Call(), Call(at=1.0, force_new=True), Call(at=1.1, key=1)), runs=SLOW),
    "a start is refused": Scenario(calls=(Call(), Call(at=0.1, key=1, incomplete=True, again=AGAIN)), runs=SLOW),
    "a turn asks a person": Scenario(calls=THREE, runs=(CrewRun("asks", 15.0), *SLOW)),
    "a turn is over its time and stopped": Scenario(calls=THREE, runs=(CrewRun("stuck"), *SLOW), stop_on_timeout=True),
    "a budget has room for two turns": Scenario(calls=THREE, runs=SLOW, budget=2),
    "the first record is pruned, and the last one stays": Scenario(
        calls=(Call(), Call(at=9.0, key=1), Call(at=200.0, key=2)), prunes=(Prune(at=150.0), Prune(at=190.0))
    ),
    "the only record is old": Scenario(calls=(Call(), Call(at=200.0, key=1)), prunes=(Prune(at=150.0),)),
    "prune falls asleep": Scenario(
        calls=(Call(), Call(at=9.0, key=1), Call(at=152.0, key=2), Call(at=170.0, key=3)),
        prunes=(Prune(at=150.0, freeze_at=7, freeze_for=10.0), Prune(at=175.0)),
    ),
}
for fault in ("429-before-accept=3@1", "500-after-accept@1", "500-before-accept@1", "timeout-after-accept@2", "drop@2"):
    WORLDS[f"a kickoff meets {fault}"] = Scenario(
        calls=tuple(Call(at=call.at, key=call.key, again=AGAIN) for call in THREE),
        runs=SLOW,
        faults=(f"kickoff:{fault}",),
        resolve_every=2.0,
    )
for number in range(1, 12):
    for fate in ("lost", "500-after", "timeout", "late", "twice"):
        WORLDS[f"write {number} on the Prefect server is {fate}"] = Scenario(
            calls=THREE, runs=SLOW, prefect_faults=((f"write@{number}", fate),), resolve_every=2.0
        )
for step in range(1, 46):
    at = f", before its step {step}"
    WORLDS |= {
        f"the first caller dies{at}": Scenario(
            calls=(Call(kill_at=step, crashed_after=0.5, again=AGAIN), *THREE[1:]), runs=SLOW, resolve_every=2.0
        ),
        f"the second caller dies, unnoticed{at}": Scenario(
            calls=(THREE[0], Call(at=0.1, key=1, kill_at=step, again=AGAIN), THREE[2]), runs=SLOW, resolve_every=2.0
        ),
        f"the first caller falls asleep{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=200.0), *THREE[1:]), runs=SLOW, resolve_every=2.0
        ),
        f"the first caller falls asleep, and is said to have crashed{at}": Scenario(
            calls=(Call(freeze_at=step, freeze_for=60.0, crashed_at=1.0, again=AGAIN), *THREE[1:]),
            runs=SLOW,
            resolve_every=2.0,
        ),
        f"the second caller is cancelled{at}": Scenario(
            calls=(THREE[0], Call(at=0.1, key=1, cancel_at=step, asked=True), THREE[2]), runs=SLOW, resolve_every=2.0
        ),
        f"a caller beside a run without a flow run is cancelled{at}": Scenario(
            calls=(Call(flow=False), Call(at=0.1, key=1, cancel_at=step, asked=True)), runs=SLOW
        ),
        f"the second caller sleeps until its turn was taken and pruned{at}": Scenario(
            calls=(
                Call(),
                Call(at=10.0, key=1, freeze_at=step, freeze_for=390.0),
                *(Call(at=at_, key=key) for at_, key in ((20.0, 2), (30.0, 3), (390.0, 4))),
            ),
            runs=(*[CrewRun(seconds=1.0)] * 3, CrewRun(seconds=60.0)),
            prunes=(Prune(at=300.0),),
        ),
    }


WORLDS = {name: replace(world, session=True) for name, world in WORLDS.items()}


@pytest.mark.parametrize("name", WORLDS)
def test_turns_come_one_after_the_other_when(name: str) -> None:
    world = World(WORLDS[name]).play()
    assert not (broken := broken_promises(world, strict=True)), "\n".join([*broken, *world.trace])


def test_the_page_says_how_many_worlds_there_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "explanation" / "at-most-once.md"
    assert f"| {len(WORLDS)} simulated worlds " in page.read_text("utf-8")


def test_each_call_has_a_turn_of_its_own() -> None:
    world = World(WORLDS["three call at the same time"]).play()
    assert world.site.counters.kickoffs == 3
    assert all(isinstance(world.final[key_of(number)][-1], CrewResult) for number in range(3))


def _any_is_over(*_: object) -> bool:
    return True


async def _take_turn_as_before(record: RunRecord, records: Any) -> Any:
    turn = await _take_turn(record, records)
    return turn and turn.model_copy(update={"restored": None})


async def _build_on_each(record: RunRecord, records: Any) -> Any:
    with mock.patch.object(
        sessions.Turn, "completed_state", lambda turn, record: record.kickoff_id if record else turn.restored
    ):
        return await _take_turn(record, records)


async def _no_last_turn(records: Any) -> bool:
    return False


_take_turn = sessions.take_turn
MISTAKES: dict[str, tuple[Any, str, Any, str]] = {
    "nobody waits for the turn before": (sessions, "is_over", _any_is_over, "a turn is forced"),
    "each turn starts empty": (kickoff, "take_turn", _take_turn_as_before, "three call at the same time"),
    "a failed turn is built on": (kickoff, "take_turn", _build_on_each, "a turn fails and is left out"),
    "the last record is pruned": (prune, "has_last_turn", _no_last_turn, "the only record is old"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_turns_is_seen(mistake: str) -> None:
    owner, name, replacement, world = MISTAKES[mistake]
    with mock.patch.object(owner, name, replacement):
        assert broken_promises(World(WORLDS[world]).play(), strict=True)
