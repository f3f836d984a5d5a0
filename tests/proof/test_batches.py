"""Batches over random data sets, faults and kills: every row ends once, in the output or as uncertain, and costs once.

Counted where it costs, on the crew's server: at most one kickoff for each row and attempt. Three small ones without a
kill run each time; `make prove` adds hundreds that die at random moments, 2,000 rows killed twenty times, and a soak.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from prefect_crew import DeployedCrew, WaitPolicy, arun_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import find_store
from prefect_crew.store import attempts
from prefect_crew.store.batches import read_rows
from prefect_crew.store.decision import PREPARING, AttemptState
from proof.kills import Kill
from proof.resolve import is_in_doubt, let_an_hour_pass, resolve
from proof.zygote import Script, Zygote
from support.scripts import JOURNAL, script
from support.servers import at_random, let_requests_end

PICKY = {"output": "on {{ topic }}", "fail": "{{ 'no ' + topic if 'bad' in topic }}"}
WAIT = {"initial": 0.05, "factor": 1.5, "max_interval": 0.3, "jitter": 0, "timeout": 60, "lost_after": 1}
# fmt: off
KICKOFF_FAULTS = (
    "400", "404", "408", "422", "429=0.1", "429-bare", "500", "500-after-accept", "502", "503=0.1", "503-bare", "504",
    "drop", "drop-after-accept", "redirect", "html", "garbage", "empty", "no-id-after-accept",
    "timeout-after-accept=1.5", "early-404=2", "early-404-seconds=0.3",
)
STATUS_FAULTS = (
    "429=0.1", "429-bare", "500", "502", "503=0.1", "503-bare", "504", "408", "drop", "timeout=1.5", "html", "garbage",
    "empty", "forgotten",
)
# fmt: on
FAULTS = (*(f"kickoff:{name}" for name in KICKOFF_FAULTS), *(f"status:{name}" for name in STATUS_FAULTS))

WHILE_STARTING = ("begin", "started", "ended", "transaction", "kickoff", "status")
"""Points at which a batch may die while its rows are started, by their names in `kills.HOOKS`."""
KILLS = (*WHILE_STARTING, "enter-rows", "export", "export-page")
"""All points of a batch's life at which it may die."""

QUICK = (
    "kickoff:drop-after-accept%0.3",
    "kickoff:500%0.3",
    "kickoff:empty-after-accept%0.3",
    "kickoff:422%0.3",
    "status:html%0.3",
)


@dataclass(frozen=True)
class World:
    """One batch and all that happens to it."""

    topics: list[str]
    keyed: bool
    faults: list[str] = field(default_factory=list[str])
    kills: list[Kill] = field(default_factory=list[Kill])
    max_in_flight: int = 10
    kickoffs_at_once: int = 64
    retries: int = 0
    seconds: float = 0.05

    @property
    def spec(self) -> str:
        return script({**PICKY, "seconds": self.seconds}, inputs=["topic"])


topics = st.lists(st.sampled_from(["tea", "milk", "bad milk", "ü 🙂", "a\nb", 'say "x", y']), min_size=1, max_size=25)
faults = st.lists(
    st.builds("{}%{}".format, st.sampled_from(FAULTS), st.sampled_from([0.1, 0.3])), max_size=3, unique=True
)
kills = st.builds(Kill, st.sampled_from(KILLS), st.sampled_from(["before", "after"]), st.integers(1, 25))
worlds = st.builds(
    World,
    topics=topics,
    keyed=st.booleans(),
    faults=faults,
    max_in_flight=st.integers(1, 12),
    retries=st.integers(0, 1),
)
# Without those after which a batch rests.
quick = worlds.map(lambda world: World(**{**world.__dict__, "faults": [QUICK[len(world.topics) % len(QUICK)]]}))
deadly = st.builds(
    lambda world, deaths: World(**{**world.__dict__, "kills": deaths}), worlds, st.lists(kills, max_size=3)
)


class Place:
    """Where a world's files are, and what its batch is called with."""

    def __init__(self, world: World, server: CrewServer, folder: Path) -> None:
        folder.mkdir()
        self.server = server
        self.name = f"proof {uuid.uuid4().hex[:12]}"
        self.output = folder / "out.jsonl"
        self.dataset = folder / "rows.csv"
        with self.dataset.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "topic"])
            writer.writerows([(f"row {number}", topic) for number, topic in enumerate(world.topics)])
        self.crew: dict[str, Any] = {"url": server.url, "token": server.token, "request_timeout": 1.0}
        self.crew["max_attempts"] = 1 + world.retries
        self.options: dict[str, Any] = {
            "name": self.name,
            "export": str(self.output),
            "key": "id" if world.keyed else None,
            "max_in_flight": world.max_in_flight,
            "kickoffs_at_once": world.kickoffs_at_once,
            "breaker": None,
            "wait": WAIT,
        }

    def call(self, **more: Any) -> Script:
        return Script(self.crew, {"dataset": str(self.dataset), **self.options}, **more)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    async def starts(self) -> tuple[Counter[str], set[str], set[str]]:
        """Return how many attempts of each row may have started a run, the rows that are uncertain, and those in
        flight."""
        started, store = Counter[str](), find_store()
        for attempt in await store.run(attempts.list_attempts, batch=self.name, limit=1_000_000):
            started[attempt.key] += attempt.state is not AttemptState.NOT_STARTED
        rows = await store.run(read_rows, self.name, limit=1_000_000)
        uncertain = {row.row_key for row in rows if row.state in (AttemptState.UNCERTAIN, *PREPARING)}
        return started, uncertain, {row.row_key for row in rows if row.state is AttemptState.STARTED}

    def check(self, world: World, report: Mapping[str, Any]) -> None:
        """Every promise, once the last call has ended."""
        lines, (started, uncertain, in_flight) = self.lines(), asyncio.run(self.starts())
        keys = [line["key"] for line in lines]
        assert len(keys) == len(set(keys)), "a row is in the output twice"
        assert not set(keys) & uncertain, "a row is in the output and uncertain"
        assert not set(keys) & in_flight, "a row is in the output and in flight"
        assert len(keys) + len(uncertain) + len(in_flight) == len(world.topics), "a row is missing"
        assert report["uncertain"] == len(uncertain)
        assert report["completed"] + report["failed"] + report["uncertain"] == report["total"] == len(world.topics)
        cost = self.server.kickoffs_by_key
        assert self.server.kickoffs == cost.total()
        assert {key: count for key, count in cost.items() if count > started[key]} == {}, "an attempt was started twice"
        assert max(started.values(), default=0) <= 1 + world.retries
        for line in lines:
            if line["kickoff_id"] is not None:
                accepted = self.server.accepted[line["kickoff_id"]]
                assert accepted["idempotency_key"] == f"batch/{self.name}/{line['key']}", "a row has another row's run"
            if line["state"] == "completed":
                assert line["output"] == f"on {line['inputs']['topic']}"
        if world.keyed:
            rows = {f"row {number}": topic for number, topic in enumerate(world.topics)}
            assert all(rows[line["key"]] == line["inputs"]["topic"] for line in lines)
            assert keys == [key for key in rows if key in set(keys)], "lines are in the order of the rows"
        else:
            inputs = Counter(line["inputs"]["topic"] for line in lines)
            assert not inputs - Counter(world.topics), "a row was run that is not there"


QUIET = settings(
    deadline=None,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.function_scoped_fixture),
    phases=(Phase.generate,),
    report_multiple_bugs=False,
)


@seed(5)
@settings(QUIET, max_examples=3)
@given(world=quick)
@pytest.mark.usefixtures("prefect_api")
def test_every_row_ends_once_whatever_the_server_answers(world: World, tmp_path: Path) -> None:
    with CrewServer(world.spec, faults=at_random(*world.faults, seed=1)) as server:
        place = Place(world, server, tmp_path / uuid.uuid4().hex)
        options = {**place.options, "wait": WaitPolicy(**WAIT)}
        crew = DeployedCrew(**place.crew)  # type: ignore[arg-type]
        asyncio.run(arun_batch(crew, str(place.dataset), **options))
        server.faults.clear()
        report = asyncio.run(arun_batch(crew, str(place.dataset), **options))
        place.check(world, report.as_dict())


def lives(world: World, zygote: Zygote, folder: Path, faults_seed: int = 1) -> None:
    with CrewServer(world.spec, faults=at_random(*world.faults, seed=faults_seed)) as server:
        place = Place(world, server, folder)
        for kill in world.kills:
            ended = zygote.run_one(place.call(kill=kill))
            note(f"{kill}: {ended}")
        server.faults.clear()
        let_requests_end(server)
        ended = zygote.run_one(place.call())
        note(f"{ended}; kickoffs {dict(server.kickoffs_by_key)}; log in {zygote.folder}")
        assert not ended.error
        place.check(world, ended.counts())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
@pytest.mark.timeout(900)
def test_every_row_ends_once_wherever_its_batch_dies(
    number: int, zygote: Zygote, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    chosen = 1000 * pytestconfig.getoption("seed") + number

    def dies(world: World) -> None:
        lives(world, zygote, tmp_path / uuid.uuid4().hex, number)

    seed(chosen)(settings(QUIET, max_examples=10)(given(deadly)(dies)))()


def only_when_all_are_run(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("sample") is not None:
        pytest.skip("needs minutes more than a sample has: make prove runs it")


def a_death(luck: random.Random, rows: int) -> Kill:
    """Choose a moment at which a batch dies before it has begun all of that many rows."""
    hook, when, most = luck.choice(WHILE_STARTING), luck.choice(("before", "after")), min(100, max(1, rows // 2))
    # A commit may hold many transactions: some twenty rows are begun by each, and as many by one that waits for it.
    return Kill(hook, when, luck.randint((most + 4) // 5, most) if hook != "transaction" else max(1, most // 10))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("rows", "deaths"), [pytest.param(600, 3, id="a-few"), pytest.param(2000, 20, id="many")])
def test_rows_of_a_batch_that_is_killed_again_and_again(
    rows: int, deaths: int, request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path, notes: list[str]
) -> None:
    if rows > 600:
        only_when_all_are_run(request)
    chosen = request.config.getoption("seed")
    luck, began = random.Random(chosen), time.monotonic()
    topics = [f"topic {number}" for number in range(rows)]
    world = World(topics, keyed=True, max_in_flight=rows // 10, kickoffs_at_once=16, seconds=0.3)
    with CrewServer(world.spec) as server:
        place = Place(world, server, tmp_path / "batch")
        unclaimed = rows
        for left in range(deaths, 0, -1):
            kill = a_death(luck, unclaimed // left)
            assert zygote.run_one(place.call(kill=kill)).killed, f"seed {chosen}: it ended before {kill}"
            unclaimed = rows - len(asyncio.run(place.starts())[0])
        _, uncertain, _ = asyncio.run(place.starts())
        ended = zygote.run_one(place.call())
        assert not ended.error
        place.check(world, ended.counts())
        assert server.kickoffs_by_key.most_common(1)[0][1] == 1
        assert ended.counts()["uncertain"] <= deaths * world.kickoffs_at_once, "more than could have been on their way"
        notes.append(
            f"{rows:,} rows killed {deaths} times (seed {chosen}): {len(uncertain)} uncertain, "
            f"{server.kickoffs} kickoffs, {time.monotonic() - began:.0f} s"
        )


SESSIONS, NOTES = 3, 6


def resolve_rows(place: Place) -> int:
    """Resolve the uncertain rows of a dead batch by the runs that its server has accepted. Return their number."""
    asyncio.run(let_an_hour_pass())
    found = asyncio.run(find_store().run(attempts.list_attempts, batch=place.name, limit=1_000_000))
    unresolved = [attempt for attempt in found if is_in_doubt([attempt])]
    for attempt in unresolved:
        resolve(place.server, attempt.key)
    return len(unresolved)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("prefect_api")
def test_turns_of_rows_whose_batches_are_killed(
    request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path, notes: list[str]
) -> None:
    luck, killed, uncertain = random.Random(request.config.getoption("seed")), 0, 0
    with CrewServer(JOURNAL, speed=3) as server:
        places = [Place(World([], keyed=True), server, tmp_path / name) for name in "ab"]
        for place in places:
            rows = [f"{at}{session},slow,{session}" for at in range(NOTES) for session in range(SESSIONS)]
            place.dataset.write_text("\n".join(["id,note,who", *rows]))
            place.options |= {"session": "who", "wait": {**WAIT, "timeout": 20}}
            place.crew["flow"] = True
        for round_ in range(30):
            dies = [luck.uniform(1, 5) if round_ < 8 else None for _ in places]
            calls = [place.call(dies_after=seconds) for place, seconds in zip(places, dies, strict=True)]
            ended = zygote.run(*calls)
            assert not [one for one in ended if one.error]
            killed += sum(one.killed for one in ended)
            let_requests_end(server)
            uncertain += sum(resolve_rows(place) for place in places)
            if all((one.report or {}).get("completed") == SESSIONS * NOTES for one in ended):
                break
        assert all(count == 1 for count in server.kickoffs_by_key.values())
        assert server.kickoffs == 2 * SESSIONS * NOTES
        last = {run.id: run for run in server.runs}
        for run in server.runs:  # each turn starts from another one that had completed
            before = last.pop(run.restore_from, None) if run.restore_from else None
            assert run.restore_from is None or before is not None, "two turns start from one"
            assert before is None or before.created_at + timedelta(seconds=before.execution_time) <= run.created_at
        assert len(last) == sum(run.restore_from is None for run in server.runs) == SESSIONS
    notes.append(
        f"{server.kickoffs} turns of rows, {killed} batches killed, {uncertain} rows uncertain, {round_ + 1} rounds"
    )
    assert killed > 4


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_soak_of_twenty_thousand_rows(
    request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path, notes: list[str]
) -> None:
    only_when_all_are_run(request)
    began = time.monotonic()
    rows = [f"topic {number}" if number % 50 else f"bad {number}" for number in range(20_000)]
    world = World(rows, keyed=True, max_in_flight=1000, seconds=1.0)
    share = {name: 0.02 / len(kinds) for kinds in (KICKOFF_FAULTS, STATUS_FAULTS) for name in kinds}
    every = [
        *(f"kickoff:{name}%{share[name]:.5f}" for name in KICKOFF_FAULTS),
        *(f"status:{name}%{share[name]:.5f}" for name in STATUS_FAULTS),
        *("kickoff:401@5000", "status:403@9000"),
    ]
    with CrewServer(world.spec, faults=at_random(*every, seed=7)) as server:
        place = Place(world, server, tmp_path / "batch")
        place.options["wait"] = {**WAIT, "initial": 1.0, "max_interval": 2.0}
        place.crew["request_timeout"] = 5.0  # a busy machine may need more than a second for an answer
        calls = 0
        while calls < 8:
            calls += 1
            if calls > 4:
                server.faults.clear()
            ended = zygote.run_one(place.call())
            assert not ended.error, ended.error
            if not ended.counts()["skipped"] and calls > 4:
                break
        place.check(world, ended.counts())
        assert server.kickoffs_by_key.most_common(1)[0][1] == 1
        report = ended.counts()
        assert report["completed"] > 19_000
        notes.append(
            f"soak: 20,000 rows, {report['completed']} completed, {report['failed']} failed, {report['uncertain']} "
            f"uncertain, {server.kickoffs} kickoffs in {calls} calls, {time.monotonic() - began:.0f} s"
        )
