"""SIGKILL of a process that calls the package, at moments that its crew's server sees, and the same call by another.

At most one kickoff in all cases, unless a person resolved. Where the process died between its kickoff and the record of
the id nobody knows, and the next call says so; a person resolves that by the command, and the call after it returns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outcomes.callers import Caller, Callers, Ended, WatchedServer
from outcomes.driver import ASKS, FLOW, LONG, QUICKLY, Command, Fickle, Held, World, crew
from support.prefect_server import PrefectServer
from support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.timeout(240)]

UNCERTAIN = "KickoffUncertainError"


@pytest.fixture(scope="module")
def callers(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callers]:
    """Forks callers; each gets the settings that this process has then."""
    with Callers(tmp_path_factory.mktemp("callers")) as running:
        yield running


@dataclass(frozen=True)
class Kill:
    """A moment, and what the next call may do.

    The moment is `seconds` after the n-th request at `place` has "arrived", or was "answered"; "ended" is the first
    answer that tells the run's end. `then` has "returns" (without a kickoff), "starts" (a kickoff, and its result),
    and names of errors.
    """

    name: str
    place: str
    when: str
    then: frozenset[str]
    nth: int = 1
    seconds: float = 0.0
    faults: tuple[str, ...] = ()
    crew: Any = LONG
    review: str | None = None
    resumes: int = 0
    kickoffs: int = 1
    """The most runs that may be started in all, while no person has resolved anything."""


def then(*names: str) -> frozenset[str]:
    return frozenset(names)


DOUBT = then("returns", UNCERTAIN)
RETURNS = then("returns")
# Designs differ here, and both hold what is promised: what surely sent nothing is known as such, or is uncertain.
EITHER = then("starts", UNCERTAIN)
ASKING: dict[str, Any] = {"crew": ASKS, "review": "yes", "resumes": 1}
SENT_OR_NOT = then("returns", "AnswerUncertainError", "CrewTimeoutError")

SLOW = (
    Kill("at GET /inputs", "inputs", "arrived", then("starts")),
    Kill("GET /inputs was answered", "inputs", "answered", EITHER),
    Kill("POST /kickoff has arrived", "kickoff", "arrived", then(UNCERTAIN)),
    Kill("POST /kickoff has arrived, and is not handled", "kickoff", "arrived", then(UNCERTAIN), faults=("kickoff:drop-before-accept@1",)),
    *(Kill(f"{ms} ms after the answer to POST /kickoff", "kickoff", "answered", DOUBT, seconds=ms / 1000) for ms in (0, 5, 20, 50)),
    Kill("in a pause after 429", "kickoff", "answered", EITHER, seconds=0.5, faults=("kickoff:429=2@1",)),
    Kill("in a pause after 503", "kickoff", "answered", EITHER, seconds=0.5, faults=("kickoff:503=2@1",)),
)  # fmt: skip
QUICK = (
    Kill("at the first GET /status", "status", "arrived", RETURNS),
    Kill("the first GET /status was answered", "status", "answered", RETURNS),
    Kill("between two looks", "status", "answered", RETURNS, nth=3, seconds=0.05),
    Kill("the end was delivered", "status", "ended", RETURNS),
    Kill("20 ms after the end was delivered", "status", "ended", RETURNS, seconds=0.02),
    Kill("60 ms after the end was delivered", "status", "ended", RETURNS, seconds=0.06),
    # The next call reads the failure as its own, or finds it on record and starts again.
    Kill("a failure was delivered", "status", "ended", then("CrewFailedError", "starts"), crew=Fickle, kickoffs=2),
    Kill("20 ms after a failure was delivered", "status", "ended", then("CrewFailedError", "starts"), seconds=0.02, crew=Fickle, kickoffs=2),
    Kill("POST /resume has arrived", "resume", "arrived", SENT_OR_NOT, **ASKING),
    Kill("POST /resume has arrived, and is not handled", "resume", "arrived", SENT_OR_NOT, faults=("resume:drop-before-accept@1",), **ASKING),
    Kill("POST /resume was answered", "resume", "answered", RETURNS, **ASKING),
    Kill("100 ms after POST /resume was answered", "resume", "answered", RETURNS, seconds=0.1, **ASKING),
    Kill("while it waits for a person", "status", "answered", then("CrewTimeoutError"), nth=3, crew=ASKS),
)  # fmt: skip


class Stage:
    """A crew's server, and those who call it; `kill` names the moment at which the first caller dies."""

    def __init__(self, callers: Callers, kill: Kill, folder: Path) -> None:
        self.callers, self.kill, self.is_hit = callers, kill, threading.Event()
        self.first: Caller | None = None
        spec = kill.crew() if isinstance(kill.crew, type) else kill.crew
        self.server = WatchedServer(spec, on=self._on, faults=kill.faults)
        self.world = World(self.server, folder)
        self.key = str(self.world.key("k"))

    def _on(self, place: str, when: str, number: int) -> None:
        kill = self.kill
        if kill.when == "ended" and when == "answered" and place == "status" and self.server.runs[0].state.ended:
            when, number = "ended", kill.nth
        if self.first is None or (place, when, number) != (kill.place, kill.when, kill.nth) or self.is_hit.is_set():
            return
        self.is_hit.set()
        if kill.seconds:
            threading.Timer(kill.seconds, self.first.kill).start()
        else:
            self.first.kill()

    def call(self, **more: Any) -> Caller:
        """Start a caller with the key of this stage."""
        call: dict[str, Any] = {"inputs": {"text": "tea"}, "idempotency_key": self.key, **more}
        return self.callers.start(self.fields, call)

    @property
    def fields(self) -> dict[str, Any]:
        wait = {**QUICKLY, "human_timeout": 3}
        is_flow = self.server.is_flow
        return {"url": self.server.url, "token": self.server.token, "wait": wait, "flow": is_flow}

    def release(self) -> None:
        """Let the runs of a crew that is held end."""
        program: Any = self.server.program
        program.released = True

    def killed(self, caller: Caller) -> None:
        """Wait until the first caller was killed."""
        self.first = caller
        may_be_over = self.kill.when == "ended" and self.kill.seconds  # a quick caller has returned by then
        assert caller.ended().killed or may_be_over, "it ended before the moment of its death"
        assert self.is_hit.is_set()
        self.server.faults.clear()

    async def resolve(self, key: str) -> None:
        """Resolve an uncertain kickoff by what the server has accepted, as a person does who looks at its page."""
        started = [id_ for id_, meta in self.server.accepted.items() if meta["idempotency_key"] == key]
        outcome = f"--kickoff-id {started[0]} --crew" if started else "--never-started --yes"
        await Command(f"runs resolve {key} {outcome}", waits=True).play(self.world)


def outcome_of(ended: Ended, *, is_new: bool) -> str:
    """Return what a call did, in the words of `Kill.then`."""
    return ended.error or ("starts" if is_new else "returns")


@pytest.mark.parametrize(
    "kill", [*QUICK, *(pytest.param(kill, marks=pytest.mark.slow) for kill in SLOW)], ids=lambda kill: kill.name
)
async def test_what_the_next_call_does(kill: Kill, callers: Callers, tmp_path: Path) -> None:
    stage = Stage(callers, kill, tmp_path)
    with stage.server as server:
        options = {"review": kill.review} if kill.review else {}
        stage.killed(stage.call(**options))
        before = server.kickoffs
        second = stage.call(**options).ended()
        outcome = outcome_of(second, is_new=server.kickoffs > before)
        assert outcome in kill.then, second
        assert server.kickoffs <= kill.kickoffs
        assert server.requests["resume"] == kill.resumes
        if second.error in ("AnswerUncertainError", "CrewTimeoutError"):
            return  # the run waits for a person, and no answer was sent again
        if second.error == UNCERTAIN:
            assert stage.key in second.text
            assert "prefect-crew runs resolve" in second.text
            await stage.resolve(stage.key)
        ends = [stage.call(**options).ended() for _ in range(2)]
        assert [end.result and end.result["output"] for end in ends] == ["tea", "tea"], ends
        assert ends[0] == ends[1]
        assert set(server.kickoffs_by_key.values()) <= {1, kill.kickoffs}
        assert server.requests["resume"] == kill.resumes


async def test_a_caller_after_the_other_is_killed(callers: Callers, tmp_path: Path) -> None:
    stage = Stage(callers, Kill("", "status", "answered", RETURNS, crew=Held), tmp_path)
    with stage.server as server:
        stage.killed(stage.call())
        for _ in range(2):
            polls, caller = server.requests["status"], stage.call()
            wait_until(lambda polls=polls: server.requests["status"] > polls, "a poll")
            caller.kill()
            assert caller.ended().killed
        stage.release()
        assert stage.call().ended().result == {"kickoff_id": stage.world.run_id(1), "output": "tea"}
        assert server.kickoffs == server.requests["kickoff"] == 1


@pytest.mark.parametrize(
    ("place", "expected"),
    [("status", "returns"), pytest.param("kickoff", UNCERTAIN, marks=pytest.mark.slow)],
    ids=["while it polls", "at its kickoff"],
)
async def test_a_call_beside_the_one_that_is_killed(
    place: str, expected: str, callers: Callers, tmp_path: Path
) -> None:
    held = ("kickoff:latency=2@1",) if place == "kickoff" else ()
    slow, nth = crew({"seconds": 4, "output": "{{ text }}"}), 3 if place == "status" else 1
    kill = Kill("", place, "arrived", RETURNS, nth, 0.8, faults=held, crew=slow)
    stage = Stage(callers, kill, tmp_path)
    with stage.server as server:
        first = stage.call()
        stage.first = first  # known before its moment
        wait_until(lambda: server.requests[place], f"a request at {place}")
        second = stage.call()
        stage.killed(first)
        assert outcome_of(second.ended(), is_new=False) == expected
        assert server.requests["kickoff"] == 1


async def test_a_turn_of_a_session_whose_caller_is_killed(callers: Callers, tmp_path: Path) -> None:
    stage = Stage(callers, Kill("", "status", "answered", RETURNS, crew=FLOW), tmp_path)
    with stage.server as server:
        session = {"session": stage.key}
        stage.killed(stage.call(**session))
        second = stage.call(**session | {"idempotency_key": f"{stage.key}-2"}).ended()
        first = stage.call(**session).ended()
        outputs = [ended.result and ended.result["output"] for ended in (first, second)]
        assert outputs == ["1", "2 after 1"]
        assert server.kickoffs == server.requests["kickoff"] == 2


ROWS = [{"name": f"row{number}", "text": f"text {number}"} for number in range(8)]


@pytest.mark.parametrize(
    ("place", "nth"),
    [("status", 80), pytest.param("kickoff", 4, marks=pytest.mark.slow)],  # every row has been polled by then
    ids=["with all rows in flight", "between kickoffs"],
)
async def test_a_batch_that_is_killed_goes_on(place: str, nth: int, callers: Callers, tmp_path: Path) -> None:
    stage = Stage(callers, Kill("", place, "answered", RETURNS, nth=nth, crew=Held), tmp_path)
    export = str(tmp_path / "out.jsonl")
    call = {"dataset": ROWS, "name": stage.key, "export": export, "key": "name", "inputs": {"text": "text"}}
    with stage.server as server:
        stage.killed(callers.start(stage.fields, call, batch=True))
        stage.release()
        report = callers.start(stage.fields, call, batch=True).ended().result
        assert report
        doubtful = report["uncertain"]
        assert place == "kickoff" or not doubtful, "all ids were on record"
        assert report["completed"] == len(ROWS) - doubtful
        if doubtful:
            lines = map(json.loads, Path(export).read_text().splitlines())
            done = {line["key"] for line in lines if line["state"] == "completed"}
            for row in ROWS:
                if row["name"] not in done:
                    await stage.resolve(f"batch/{stage.key}/{row['name']}")
            report = callers.start(stage.fields, call, batch=True).ended().result
            assert report
        assert report["completed"] == len(ROWS), report
        assert set(server.kickoffs_by_key.values()) == {1}
        assert server.kickoffs == len(ROWS)
