"""SIGKILL at every point of a run's life, and the same script called again.

Counted where it costs, on the crew's server: never a second kickoff. Every run ends with its result, or is reported as
uncertain, and that only where the kill fell between the permit and the record of the id. A run that is resolved goes on
as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import CrewError
from prefect_crew.records.resolve import unresolved
from prefect_crew.records.store import PrefectRecords
from proof.kills import POINTS, Kill
from proof.resolve import resolve
from proof.zygote import Script, Zygote
from support.deployed import command
from support.prefect_server import PrefectServer
from support.scripts import script
from support.seen import Seen

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]

CREW = script({"seconds": 1.0, "output": "{{ text }}, done"}, inputs=["text"])
DOUBTFUL = {
    "after permit",
    "before kickoff",
    "during kickoff (kickoff:latency=1)",
    "during kickoff (kickoff:timeout-after-accept=2)",
    "after kickoff",
    "before save",
}
"""The points between the permit and the record, of those that are named after a function."""


def script_of(server: CrewServer, idempotency_key: str, kill: Kill | None = None, **fields: Any) -> Script:
    wait = {"initial": 0.2, "max_interval": 0.5, "timeout": 60}
    crew = {"url": server.url, "token": server.token, "request_timeout": 3, "wait": wait, **fields}
    return Script(crew, {"text": "tea"}, idempotency_key, kill)


def records(seen: Seen, idempotency_key: str) -> list[dict[str, Any]]:
    return seen.records(idempotency_key)


@pytest.mark.parametrize("kill", POINTS, ids=str)
def test_a_script_that_was_killed_is_called_again(kill: Kill, zygote: Zygote, seen: Seen, idempotency_key: str) -> None:
    with CrewServer(CREW, faults=kill.faults) as server:
        (first,) = zygote.run(script_of(server, idempotency_key, kill))
        assert first.killed, f"it ended before: {first}"
        time.sleep(1.2 if kill.faults else 0.2)  # what it has sent arrives
        server.faults.clear()
        assert server.kickoffs <= 1
        stood = records(seen, idempotency_key)
        claimed = bool(stood) and stood[-1]["phase"] == "claimed"
        doubtful = claimed and stood[-1]["entries"] > 0
        if kill.hook != "request":
            assert doubtful == (str(kill) in DOUBTFUL)
        if claimed:
            # What Prefect's heartbeats find out in a minute.
            seen.set_state(stood[-1]["flow_run_id"], "CRASHED")

        (second,) = zygote.run(script_of(server, idempotency_key))
        if doubtful:
            assert second.error == "KickoffUncertainError"
            assert idempotency_key in second.text
            assert server.kickoffs <= 1
            # Whatever the flow run's state says, the kickoff may still be on its way.
            with pytest.raises(CrewError, match="may still be"):
                asyncio.run(unresolved(idempotency_key, PrefectRecords()))
            resolve(server, idempotency_key)
            (second,) = zygote.run(script_of(server, idempotency_key))
        assert second.output == "tea, done"
        assert server.kickoffs_by_key == {idempotency_key: 1}

        (third,) = zygote.run(script_of(server, idempotency_key))
        assert (third.kickoff_id, third.output) == (second.kickoff_id, second.output)
        assert server.kickoffs == 1
        assert [record["state"] for record in records(seen, idempotency_key) if record["phase"] == "ended"] == [
            "completed"
        ]


@pytest.mark.parametrize("accepted", [True, False], ids=["it was accepted", "it never arrived"])
def test_what_is_resolved_on_the_command_line_goes_on(
    accepted: bool, zygote: Zygote, seen: Seen, idempotency_key: str, prefect_api: PrefectServer
) -> None:
    kill = Kill("kickoff", "after" if accepted else "before")
    with CrewServer(CREW) as server:
        zygote.run(script_of(server, idempotency_key, kill))
        seen.set_state(records(seen, idempotency_key)[-1]["flow_run_id"], "CRASHED")
        answer = ["--kickoff-id", server.runs[0].id] if accepted else ["--never-started", "--yes"]
        with pytest.raises(AssertionError, match="may still be"):
            command("prefect-crew", "runs", "resolve", idempotency_key, *answer, env=prefect_api.env())
        time.sleep(16)  # 2 s for its permit, 6 s for its kickoff, and a margin
        command("prefect-crew", "runs", "resolve", idempotency_key, *answer, env=prefect_api.env())
        (ended,) = zygote.run(script_of(server, idempotency_key))
        assert ended.output == "tea, done"
        assert server.kickoffs_by_key == {idempotency_key: 1}


def test_where_nobody_noticed_the_death_the_owner_is_given_its_time(zygote: Zygote, idempotency_key: str) -> None:
    with CrewServer(CREW) as server:
        zygote.run(script_of(server, idempotency_key, Kill("kickoff", "after"), request_timeout=1))
        began = time.monotonic()
        (second,) = zygote.run(script_of(server, idempotency_key, request_timeout=1))
        assert second.error == "KickoffUncertainError"
        assert time.monotonic() - began > 5
        assert server.kickoffs == 1
