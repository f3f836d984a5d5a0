"""Twenty processes with one idempotency key, at the same moment: one kickoff, twenty equal results, one event of its
end.

On SQLite and on PostgreSQL, where both databases lock in other ways; and two kills there as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import URL_SETTING
from proof.kills import Kill
from proof.resolve import attempts_of, let_an_hour_pass, resolve
from proof.test_kill_matrix import CREW, script_of
from proof.zygote import Script, Zygote
from support.postgres import Postgres
from support.prefect_server import PrefectServer, connected
from support.scripts import Held
from support.seen import Seen
from support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RACERS = 20


def ends(seen: Seen, kickoff_id: str) -> list[dict[str, Any]]:
    """Return the events about the end of a run, once the server has had time to write them down."""
    wanted = {"event": {"name": ["crew.completed"]}, "resource": {"id": [f"prefect-crew.run.{kickoff_id}"]}}
    wait_until(lambda: seen.post("/events/filter", {"filter": wanted})["events"], "its event", pause=0.5)
    time.sleep(2)  # for a second one
    return seen.post("/events/filter", {"filter": wanted})["events"]


def race(zygote: Zygote, seen: Seen, idempotency_key: str) -> None:
    with CrewServer(CREW) as server:
        ended = zygote.run(*[script_of(server, idempotency_key) for _ in range(RACERS)])
        assert {(one.output, one.error) for one in ended} == {("tea, done", None)}
        assert len({one.kickoff_id for one in ended}) == 1
        assert server.kickoffs_by_key == {idempotency_key: 1}
        assert server.requests["kickoff"] == 1, "nobody else even tried"
        assert [attempt.state for attempt in attempts_of(idempotency_key)] == ["completed"]
        assert len(ends(seen, server.runs[0].id)) == 1


def test_twenty_racers_start_one_run(zygote: Zygote, seen: Seen, idempotency_key: str) -> None:
    race(zygote, seen, idempotency_key)


def test_twenty_racers_after_a_failure_start_one_more_run(zygote: Zygote, idempotency_key: str) -> None:
    """A failed run is started again by a call that knows of the failure, and not by each of those that waited."""
    crew = "name: c\ninputs: [text]\ntasks: [{name: t, seconds: 0.5, fail: the well is dry}]\n"
    with CrewServer(crew) as server:
        ended = zygote.run(*[script_of(server, idempotency_key) for _ in range(RACERS)])
        assert {one.error for one in ended} == {"CrewFailedError"}
        assert server.kickoffs == len(attempts_of(idempotency_key))
        assert server.kickoffs <= 3, "max_attempts"


@dataclass(frozen=True)
class OnPostgres:
    """Scripts and a look into their Prefect server, which is on PostgreSQL, as their crew database is."""

    zygote: Zygote
    seen: Seen


@pytest.fixture(scope="module")
def zygote_on_postgres(
    prefect_server_on_postgres: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Zygote]:
    folder = tmp_path_factory.mktemp("scripts-on-postgres")
    with Zygote(prefect_server_on_postgres.env(home=folder / "home"), folder) as running:
        yield running


@pytest.fixture(scope="session")
def crews_on_postgres(postgres: Postgres) -> str:
    """The URL of a crew database."""
    return postgres.create_database("race").replace("+asyncpg", "")


@pytest.fixture
def on_postgres(
    zygote_on_postgres: Zygote,
    crews_on_postgres: str,
    prefect_server_on_postgres: PrefectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[OnPostgres]:
    monkeypatch.setenv(URL_SETTING, crews_on_postgres)
    with connected(prefect_server_on_postgres, tmp_path / "home"), closing(Seen(prefect_server_on_postgres)) as seen:
        yield OnPostgres(zygote_on_postgres, seen)


def test_twenty_racers_start_one_run_on_postgres(on_postgres: OnPostgres, idempotency_key: str) -> None:
    race(on_postgres.zygote, on_postgres.seen, idempotency_key)


@pytest.mark.parametrize("kill", [Kill("kickoff", "after"), Kill("status", "after", 2)], ids=str)
def test_a_script_that_was_killed_goes_on_on_postgres(
    kill: Kill, on_postgres: OnPostgres, idempotency_key: str
) -> None:
    zygote = on_postgres.zygote
    with CrewServer(CREW) as server:
        first = zygote.run_one(script_of(server, idempotency_key, kill))
        assert first.killed
        asyncio.run(let_an_hour_pass())
        second = zygote.run_one(script_of(server, idempotency_key))
        if kill.hook == "kickoff":
            assert second.error == "KickoffUncertainError"
            resolve(server, idempotency_key)
            second = zygote.run_one(script_of(server, idempotency_key))
        assert second.output == "tea, done"
        assert server.kickoffs_by_key == {idempotency_key: 1}


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        pytest.param({"max_kickoffs": 12}, 12, id="kickoffs"),
        pytest.param({"max_cost": 1.0}, 14, id="cost of 0.07 a run"),
        # Each run uses 300 more than its estimate.
        pytest.param({"max_tokens": 6000, "estimate_tokens": 500}, 12, id="tokens"),
    ],
)
def test_twenty_processes_race_for_a_budget_on_postgres(
    on_postgres: OnPostgres, idempotency_key: str, limit: dict[str, float], most: int, notes: list[str]
) -> None:
    # Without holding, a slow machine starts one run less: an end adds to the counter before the last start has tried.
    with CrewServer(Held(most, tokens=800), response_format="live") as server:
        budgets = [{**limit, "per": "month", "name": idempotency_key}]
        crew = {"url": server.url, "token": server.token, "price": 0.07, "max_attempts": 1, "budgets": budgets}
        for turn in ("first", "second"):
            keys = [f"{idempotency_key} {turn} {number}" for number in range(RACERS)]
            scripts = [Script(crew, {"inputs": {"text": "tea"}, "idempotency_key": key}) for key in keys]
            ended = on_postgres.zygote.run(*scripts)
            assert {one.error for one in ended} <= {None, "BudgetExceededError"}
            assert server.kickoffs == sum(attempts_of(key) != [] for key in server.kickoffs_by_key)
        measure, maximum = next(iter(limit.items()))
        used_up = {"max_kickoffs": 1.0, "max_cost": 0.07, "max_tokens": 800.0}[measure] * server.kickoffs
        in_flight, beyond_estimate = most, 300 if measure == "max_tokens" else 0
        notes.append(f"budget {limit}: {server.kickoffs} runs of {2 * RACERS} started, {used_up:g} used")
        assert server.kickoffs == most, "room for no other, and no other has started"
        assert used_up <= maximum + in_flight * beyond_estimate
