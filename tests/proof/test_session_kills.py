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
from prefect_crew.runs.database import find_store
from prefect_crew.store.attempts import list_attempts
from proof.kills import Kill
from proof.resolve import attempts_of, is_in_doubt, let_an_hour_pass, resolve
from proof.zygote import Ended, Script, Zygote
from support.scripts import JOURNAL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("prefect_api")]
TURNS, AT_ONCE = 50, 2
KILLS = 2
"""How often the callers of each turn are killed, at most."""
LIFE = 3.5
"""Seconds within which a caller is killed, if it has not ended by then."""


def scripts(server: CrewServer, keys: Iterable[str], session: str, *, dies: bool) -> list[Script]:
    wait = {"initial": 0.1, "max_interval": 0.3, "timeout": 120}
    crew = {"url": server.url, "token": server.token, "request_timeout": 3, "wait": wait, "flow": True}
    calls = [{"inputs": {"note": "slow"}, "idempotency_key": key, "session": session} for key in keys]
    return [Script(crew, call, dies_after=random.uniform(0.3, LIFE) if dies else None) for call in calls]


def bury(server: CrewServer, keys: Sequence[str], states: Counter[str]) -> None:
    """Resolve what dead callers have left uncertain."""
    for key in keys:
        found = attempts_of(key)
        states[found[-1].state if found else "nothing"] += 1
        if is_in_doubt(found):
            resolve(server, key)


def test_fifty_turns_have_fifty_states(zygote: Zygote, idempotency_key: str, notes: list[str]) -> None:
    keys = [f"{idempotency_key} {number}" for number in range(TURNS)]
    session, killed, uncertain, left_as = idempotency_key[-150:], 0, 0, Counter[str]()
    with CrewServer(JOURNAL, speed=2) as server:
        for first in range(0, TURNS, AT_ONCE):
            left, kills = keys[first : first + AT_ONCE], KILLS
            while left:
                ended = zygote.run(*scripts(server, left, session, dies=kills > 0))
                kills -= 1
                killed += sum(one.killed for one in ended)
                uncertain += sum(one.error in ("KickoffUncertainError", "SessionBlockedError") for one in ended)
                bury(server, keys[first : first + AT_ONCE], left_as)
                assert {one.error for one in ended} <= {None, "KickoffUncertainError", "SessionBlockedError"}, ended
                left = [key for key, one in zip(left, ended, strict=True) if one.output is None]
        states = server.program.states  # pyright: ignore[reportAttributeAccessIssue]
        assert server.kickoffs_by_key == dict.fromkeys(keys, 1)
        ids = [run.id for run in server.runs]
        assert [run.restore_from for run in server.runs] == [None, *ids[:-1]]
        assert [states[id_]["turn"] for id_ in ids] == [*range(1, TURNS + 1)]
        assert len(states) == TURNS
        turns = asyncio.run(find_store().run(list_attempts, session=session, limit=1000))
    assert len([one for one in turns if one.kickoff_id]) == TURNS
    notes.append(
        f"{TURNS} turns of a session: {killed} callers killed, {uncertain} met an uncertain turn, {len(turns)} "
        f"attempts, left as {dict(left_as)}"
    )
    assert killed > TURNS / 4


POINTS = [
    Kill("begin", "before"),
    Kill("begin", "after"),
    Kill("begin", "committed"),
    Kill("kickoff", "after"),
    Kill("started", "after"),
    Kill("started", "committed"),
    Kill("ended", "before"),
    Kill("ended", "after"),
]


@pytest.mark.parametrize("kill", POINTS, ids=str)
def test_a_caller_that_dies_leaves_its_session_to_others(kill: Kill, zygote: Zygote, idempotency_key: str) -> None:
    session, other = idempotency_key[-150:], f"{idempotency_key} 2"
    with CrewServer(JOURNAL, speed=10) as server:

        def run(key: str, kill: Kill | None = None) -> Ended:
            (one,) = scripts(server, [key], session, dies=False)
            return zygote.run_one(replace(one, kill=kill))

        assert run(idempotency_key, kill).killed
        asyncio.run(let_an_hour_pass())
        second = run(other)
        if str(kill) in ("committed begin", "after kickoff", "after started"):
            assert second.error == "SessionBlockedError"
            assert f"runs resolve '{idempotency_key}' --kickoff-id ID" in second.text
            resolve(server, idempotency_key)
            second = run(other)
        first = run(idempotency_key)
        assert server.kickoffs_by_key == {idempotency_key: 1, other: 1}
        turns = sorted(str(one.output).split(maxsplit=1)[0] for one in (first, second))
        assert turns == ["1", "2"]
        assert server.runs[1].restore_from == server.runs[0].id
