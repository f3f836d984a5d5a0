"""SIGKILL at every point of a run's life, and the same script called again.

Counted where it costs, on the crew's server: never a second kickoff. Every run ends with its result, or is reported as
uncertain, and that only where the kill fell between the commit that allows its kickoff and that of its id. A run that
is resolved goes on as if nothing had happened. `tests/outcomes/test_kills.py` kills from outside, at what the crew's
server sees; here it is each transaction, statement and request.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import find_store
from prefect_crew.store.decision import AttemptState
from proof.kills import ANSWERS, POINTS, Kill
from proof.resolve import age_answers, attempts_of, is_in_doubt, let_an_hour_pass, resolve
from proof.zygote import Script, Zygote
from support.scripts import ASKS, script
from support.seen import Seen
from support.servers import let_requests_end
from support.waiting import LIMIT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]

CREW = script({"seconds": 1.0, "output": "{{ text }}, done"}, inputs=["text"])
DOUBTFUL = {
    "committed begin",
    "before kickoff",
    "during kickoff (kickoff:latency=1)",
    "during kickoff (kickoff:timeout-after-accept=2)",
    "after kickoff",
    "before started",
    "after started",
}
"""The points between the two commits, of those that are named after a function."""


def script_of(
    server: CrewServer, idempotency_key: str, kill: Kill | None = None, human_timeout: float = LIMIT, **more: Any
) -> Script:
    wait = {"initial": 0.2, "max_interval": 0.5, "timeout": LIMIT, "human_timeout": human_timeout}
    crew = {"url": server.url, "token": server.token, "wait": wait}
    return Script(crew, {"inputs": {"text": "tea"}, "idempotency_key": idempotency_key, **more}, kill)


@pytest.mark.parametrize("kill", POINTS, ids=str)
def test_a_script_that_was_killed_is_called_again(kill: Kill, zygote: Zygote, seen: Seen, idempotency_key: str) -> None:
    with CrewServer(CREW, faults=kill.faults) as server:
        first = zygote.run_one(script_of(server, idempotency_key, kill))
        assert first.killed, f"it ended before: {first}"
        server.faults.clear()
        let_requests_end(server)
        assert server.kickoffs <= 1
        left = attempts_of(idempotency_key)
        if kill.hook not in ("request", "statement"):
            assert is_in_doubt(left) == (str(kill) in DOUBTFUL)
        asyncio.run(let_an_hour_pass())

        second = zygote.run_one(script_of(server, idempotency_key))
        if is_in_doubt(left):
            assert second.error == "KickoffUncertainError"
            assert idempotency_key in second.text
            assert server.kickoffs <= 1
            resolve(server, idempotency_key)
            second = zygote.run_one(script_of(server, idempotency_key))
        elif left:  # a run was found, whose owner is dead: nobody has to wait for Prefect's heartbeats
            assert seen.flow_run(left[-1].flow_run_id)["state_type"] == "CRASHED"
        assert second.output == "tea, done"
        assert server.kickoffs_by_key == {idempotency_key: 1}

        third = zygote.run_one(script_of(server, idempotency_key))
        assert (third.kickoff_id, third.output) == (second.kickoff_id, second.output)
        assert server.kickoffs == 1
        assert [attempt.state for attempt in attempts_of(idempotency_key) if attempt.kickoff_id] == ["completed"]


MAY_HAVE_LEFT = {"committed send", "before resume", "during resume (resume:latency=1)"}
"""Nobody knows whether the answer was sent, and it was not, or its run has not gone on yet."""


@pytest.mark.parametrize("kill", ANSWERS, ids=str)
def test_an_answer_is_sent_once_wherever_who_gave_it_dies(kill: Kill, zygote: Zygote, idempotency_key: str) -> None:
    with CrewServer(ASKS, faults=kill.faults) as server:
        first = zygote.run_one(script_of(server, idempotency_key, kill, review="yes"))
        assert first.killed, f"it ended before: {first}"
        server.faults.clear()
        let_requests_end(server)
        sent = server.requests["resume"]
        asyncio.run(find_store().run(age_answers))
        is_unsent = str(kill) in MAY_HAVE_LEFT and not sent
        human_timeout = 3 if is_unsent else LIMIT  # nobody answers
        second = zygote.run_one(script_of(server, idempotency_key, human_timeout=human_timeout, review="yes"))
        if is_unsent:
            assert second.error in ("AnswerUncertainError", "CrewTimeoutError"), second
            assert server.requests["resume"] == 0, "an answer is not sent on a guess"
        else:
            assert second.output == "printed"
            assert server.requests["resume"] == 1
        assert server.kickoffs_by_key == {idempotency_key: 1}
        assert attempts_of(idempotency_key)[-1].state in (AttemptState.STARTED, AttemptState.COMPLETED)
