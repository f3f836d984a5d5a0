"""A session of fifty turns on a real Prefect server, whose callers are killed at random moments and started again:
fifty turns, one state each, each made of the one before."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.records.sessions import last_turn
from proof.kills import Kill
from proof.resolve import resolve
from proof.zygote import Ended, Script, Zygote
from support.scripts import JOURNAL
from support.seen import Seen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("prefect_api")]
TURNS, AT_ONCE = 50, 2
KILLS = 2
"""How often the callers of each turn are killed, at most."""
LIFE = 3.5
"""Seconds within which a caller is killed, if it has not ended by then."""


def scripts(server: CrewServer, keys: Iterable[str], session: str, *, dies: bool) -> list[Script]:
    wait = {"initial": 0.1, "max_interval": 0.3, "timeout": 120}
    crew = {"url": server.url, "token": server.token, "request_timeout": 3, "wait": wait}
    return [
        Script(
            crew,
            {"note": "slow"},
            key,
            session=session,
            dies_after=random.uniform(0.3, LIFE) if dies else None,
        )
        for key in keys
    ]


def bury(server: CrewServer, seen: Seen, keys: Sequence[str], phases: Counter[str]) -> None:
    """Report the dead callers, as Prefect's heartbeats do, and resolve what they have left uncertain."""
    for key in keys:
        records = seen.records(key)
        phases[records[-1]["phase"] if records else "nothing"] += 1
        for record in records:
            if record["phase"] == "claimed":
                seen.set_state(record["flow_run_id"], "CRASHED")
                if record["entries"]:
                    resolve(server, key)


def test_fifty_turns_have_fifty_states(zygote: Zygote, seen: Seen, idempotency_key: str) -> None:
    keys = [f"{idempotency_key} {number}" for number in range(TURNS)]
    session, killed, uncertain, phases = idempotency_key[-150:], 0, 0, Counter[str]()
    with CrewServer(JOURNAL, speed=2) as server:
        for first in range(0, TURNS, AT_ONCE):
            left, kills = keys[first : first + AT_ONCE], KILLS
            while left:
                ended = zygote.run(*scripts(server, left, session, dies=kills > 0))
                kills -= 1
                killed += sum(one.killed for one in ended)
                uncertain += sum(one.error in ("KickoffUncertainError", "SessionBlockedError") for one in ended)
                bury(server, seen, keys[first : first + AT_ONCE], phases)
                assert {one.error for one in ended} <= {None, "KickoffUncertainError", "SessionBlockedError"}, ended
                left = [key for key, one in zip(left, ended, strict=True) if one.output is None]
        states = server.crew_runs.program.states  # pyright: ignore[reportAttributeAccessIssue]
        assert server.kickoffs_by_key == dict.fromkeys(keys, 1)
        ids = [run.id for run in server.runs]
        assert [run.restore_from for run in server.runs] == [None, *ids[:-1]]
        assert [states[id_]["turn"] for id_ in ids] == [*range(1, TURNS + 1)]
        assert len(states) == TURNS
        last = asyncio.run(last_turn(server.url, session))
        assert last is not None
    print(f"{killed} callers were killed, {uncertain} met an uncertain turn, {last.number} numbers were taken")
    print(f"the records of their keys after that: {dict(phases)}")
    assert killed > TURNS / 4


POINTS = [
    Kill("turn", "before"),
    Kill("turn", "after"),
    Kill("permit", "after"),
    Kill("kickoff", "after"),
    Kill("save", "after"),
    Kill("end", "before"),
]


@pytest.mark.parametrize("kill", POINTS, ids=str)
def test_a_caller_that_dies_leaves_its_session_to_others(
    kill: Kill, zygote: Zygote, seen: Seen, idempotency_key: str
) -> None:
    session, other = idempotency_key[-150:], f"{idempotency_key} 2"
    with CrewServer(JOURNAL, speed=10) as server:

        def run(key: str, kill: Kill | None = None) -> Ended:
            (one,) = scripts(server, [key], session, dies=False)
            (ended,) = zygote.run(replace(one, kill=kill))
            return ended

        assert run(idempotency_key, kill).killed
        for record in seen.records(idempotency_key):
            seen.set_state(record["flow_run_id"], "CRASHED")
        second = run(other)
        if str(kill) in ("after permit", "after kickoff"):
            assert second.error == "SessionBlockedError"
            assert f"runs resolve '{idempotency_key}' --kickoff-id ID" in second.text
            resolve(server, idempotency_key)
            second = run(other)
        first = run(idempotency_key)
        assert server.kickoffs_by_key == {idempotency_key: 1, other: 1}
        turns = sorted(str(one.output).split(maxsplit=1)[0] for one in (first, second))
        assert turns == ["1", "2"]
        assert server.runs[1].restore_from == server.runs[0].id
