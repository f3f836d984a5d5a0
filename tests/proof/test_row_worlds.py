"""Rows of batches, runs of other batches and single runs are turns of one session, whatever happens to their callers.

Rows may leave the data set between two calls. Never are two turns in flight, each turn starts from the last completed
one, nothing is started twice, and once all has ended and each batch was called again, nothing is in the way of the next
caller.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from prefect_crew.batches import run
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.turns import RowTurns
from prefect_crew.records import sessions
from prefect_crew.records.model import RecordStore, RunRecord
from prefect_crew.records.sessions import Turn
from prefect_crew.records.store import PrefectRecords
from proof.sim.oracle import broken_promises
from proof.sim.scenario import Call, CrewRun, End, Scenario
from proof.sim.shrink import shrunk
from proof.sim.world import World

UNCLEAR = ("500-after", "500-before", "timeout-after", "timeout-before", "drop-after", "drop-before", "cut-after")
REFUSED = ("429-before", "503-before", "400-before", "404-before")
FAULTS = (
    *(f"kickoff:{name}-accept" for name in (*UNCLEAR, *REFUSED)),
    *("kickoff:latency=4", "status:500", "status:drop"),
)
PREFECT_FAULTS = ("refused", "500", "503", "lost", "500-after", "timeout", "slow", "late", "twice")
NORMAL, MANY = 8, 40
"""The worlds that run each time, and those of one slow test."""
ENDS: list[End] = ["completes", "completes", "completes", "fails"]


def a_fate(rng: random.Random, steps: int) -> dict[str, Any]:
    """Return what befalls a call at one of its steps."""
    step = rng.randrange(1, steps)
    return rng.choice(
        [
            {},
            {"kill_at": step, "crashed_after": rng.choice([None, 0.5, 70.0])},
            {"kill_at": step, "crashed_after": 0.5},
            {"freeze_at": step, "freeze_for": rng.choice([1.0, 40.0, 400.0])},
            {"cancel_at": step, "asked": rng.choice([True, False]), "timed_out": rng.random() < 0.3},
            {"crashed_at": rng.choice([1.0, 5.0])},
        ]
    )


def a_world(seed: int) -> Scenario:
    """Return a world with one or two batches and up to two single runs."""
    rng = random.Random(seed)

    def again() -> dict[str, Any]:
        return {"again": rng.choice([(), (3.0,), (0.2, 15.0), (1.0, 50.0, 50.0)]), "same_flow_run": rng.random() < 0.7}

    def batch(number: int) -> Call:
        rows = rng.choice([2, 3, 4])
        at = rng.choice([0.0, 0.0, 0.3, 2.0])
        leaves, at_once = rng.choice([0, 0, 1]), rng.choice([1, 2, 100])
        call = Call(at=at, key=number, rows=rows, leaves=leaves, max_in_flight=at_once, flow=rng.random() < 0.7)
        return replace(call, **again(), **a_fate(rng, 110 * rows))

    def single(number: int) -> Call:
        call = Call(at=rng.choice([0.0, 0.1, 1.0, 4.0, 12.0]), key=number, flow=rng.random() < 0.7)
        return replace(call, **again(), **a_fate(rng, 60))

    ends = [CrewRun(rng.choice(ENDS), rng.choice([0.0, 0.5, 3.0, 20.0])) for _ in range(8)]
    request = rng.choice([rng.randrange(1, 60), f"write@{rng.randrange(1, 16)}", f"read@{rng.randrange(1, 30)}"])
    return Scenario(
        calls=(*map(batch, rng.choice([[0], [0, 1]])), *map(single, rng.choice([[], [10], [10, 11]]))),
        runs=tuple(ends),
        faults=tuple(f"{rng.choice(FAULTS)}@{rng.randrange(1, 6)}" for _ in range(rng.choice([0, 0, 1, 2]))),
        prefect_faults=((request, rng.choice(PREFECT_FAULTS)),) if rng.random() < 0.3 else (),
        outages=((rng.choice([0.5, 3.0, 9.0]), rng.choice([1.0, 60.0, 900.0])),) if rng.random() < 0.1 else (),
        max_attempts=rng.choice([1, 3]),
        resolve_every=rng.choice([None, 0.5, 2.0]),
        order=rng.choice([0, rng.randrange(1, 1000)]),
        seed=rng.randrange(1000),
        session=True,
    )


def broken(scenario: Scenario) -> list[str]:
    return broken_promises(World(scenario).play(), strict=True)


def check(seed: int) -> None:
    scenario = a_world(seed)
    if problems := broken(scenario):
        small = shrunk(scenario, lambda smaller: bool(broken(smaller)))
        pytest.fail("\n".join([f"seed {seed}: {problems}", f"the smallest: {small}", *broken(small)]))


@pytest.mark.parametrize("seed", range(NORMAL))
def test_turns_of_rows_come_one_after_the_other(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(20))
def test_turns_of_rows_come_one_after_the_other_in_many_worlds(number: int, pytestconfig: pytest.Config) -> None:
    first = 1000 * int(str(pytestconfig.getoption("seed"))) + MANY * number
    for seed in range(first, first + MANY):
        check(seed)


async def _note_nothing(*_: object) -> None:
    pass


async def _no_runs(*_: object) -> list[RunRecord]:
    return []


async def _first_record_of(turn: Turn, records: RecordStore) -> RunRecord | None:
    store = records if turn.is_row else PrefectRecords()
    return next(iter(await store.attempts(turn.idempotency_key)), None)


MISTAKES: dict[str, tuple[Any, str, Any, int]] = {
    "nobody notes that the turn of a row is over": (RowTurns, "note", _note_nothing, 0),
    "the first attempt at a row is taken for its turn": (sessions, "record_of", _first_record_of, 1),
    "nobody waits for a run whose row has left the data set": (Ledger, "left_out", _no_runs, 9),
    "nobody notes turns before their rows leave the data set": (run, "note_before_rows_leave", _note_nothing, 195),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_turns_of_rows_is_seen(mistake: str) -> None:
    owner, name, replacement, seed = MISTAKES[mistake]
    with mock.patch.object(owner, name, replacement):
        assert broken(a_world(seed))
